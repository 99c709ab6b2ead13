"""A flag that changes nothing is refused, and so is a schedule that never gets where it is told to go."""

from __future__ import annotations

import pytest

from megatron_ssft.config import SSFTConfig
from tests.helpers.config_flags import parse, refusal

FULL = {"recompute_granularity": "full"}
CASES = [
    # the flag, what takes its use away, what gives it a use
    ({"forking_token_noise": 2}, {"forking_token_init": "mean"}, {"forking_token_init": "noise"}),
    ({"forking_token_noise": 2}, {"forking_token_format": "text"}, {}),
    ({"forking_token_init": "mean"}, {"forking_token_format": "text"}, {}),
    ({"matching_tokens": 5}, {"matching": "single"}, {"matching": "random"}),
    ({"matching_tokens_per_microbatch": 5}, {"matching": "single"}, {"matching": "fixed"}),
    ({"log_matching_interval": 5}, {"matching": "optimal"}, {"matching": "random"}),
    ({"log_matching_interval": 5}, {"matching": "single"}, {"matching": "fixed"}),
    ({"regret_interval": 5}, {}, {"matching_interval": 2}),
    ({"recompute_method": "block"}, {}, FULL),
    ({"recompute_num_layers": 2}, {"recompute_granularity": "selective"}, FULL),
    ({"min_lr": 1e-6}, {"lr_decay_style": "constant"}, {"lr_decay_style": "linear"}),
    ({"lr_decay_iters": 9}, {"lr_decay_style": "constant"}, {}),
    ({"eval_questions": 2}, {}, {"eval_data_path": "e.jsonl"}),
    ({"verify_hf": False}, {"save": "run"}, {"save": "run", "export_hf_at_save": True}),
    ({"save_optim": False}, {}, {"save": "run"}),
    ({"async_save": True}, {}, {"save": "run"}),
    ({"load_optim": False}, {"save": "run"}, {"load": "run"}),
    ({"wandb_exp_name": "x"}, {}, {"wandb_project": "p"}),
    ({"tokenizer_model": "m"}, {}, {"tokenizer_type": "HuggingFaceTokenizer"}),
]


@pytest.mark.parametrize(("flag", "without", "use"), CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_flag_without_effect_is_refused(flag, without, use):
    (name, value), no = *flag.items(), "no-" if False in flag.values() else ""
    found = refusal(lambda: parse(**without | flag))
    assert found.startswith(f"--{no}{name.replace('_', '-')}") and "has no use" in found and "leave it out" in found
    assert isinstance(value, bool) or str(value) in found
    assert isinstance(parse(**without), SSFTConfig)
    assert isinstance(parse(**use | flag), SSFTConfig)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"lr_warmup_iters": 21}, "--lr-warmup-iters 21: the run has 20 steps"),
        ({"lr_warmup_iters": 5, "lr_decay_iters": 4}, "--lr-decay-iters 4: the decay is over"),
    ],
)
def test_a_schedule_that_does_not_get_there_is_refused(changes, flag):
    assert refusal(lambda: parse(**changes)).startswith(flag)
    assert isinstance(
        parse(**{name: value + (-1 if "warmup" in name else 1) for name, value in changes.items()}), SSFTConfig
    )
