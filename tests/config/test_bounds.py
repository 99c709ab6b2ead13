"""Numbers that cannot be meant are refused by name, before they overflow somewhere or never end."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.bounds import LARGEST
from megatron_ssft.config.flags import build_config, fields_of
from megatron_ssft.errors import UserError
from tests.helpers.training_runs import BASE

VALUES = BASE | {"data_path": ["train.jsonl"]}
ABSURD = {
    "lr": 1e38, "forking_token_lr_mult": 1e300, "weight_decay": 1e300, "num_layers": 10**12, "hidden_size": 10**20,
    "vocab_size": 10**15, "make_vocab_size_divisible_by": 10**25, "seq_length": 10**25, "global_batch_size": 10**15,
    "num_forking_tokens": 10**9, "seed": -(10**30), "question_lookahead": 10**30, "train_iters": 10**30,
    "matching_tokens_per_microbatch": 10**30, "init_method_std": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_number_is_refused(name):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} "):
        build_config(VALUES | {name: ABSURD[name]}, SSFTConfig)


def test_every_bound_is_that_of_a_flag_and_above_its_default():
    fields = {name: field for name, (_, field) in fields_of(SSFTConfig).items()}
    assert LARGEST.keys() <= fields.keys()
    for name, largest in LARGEST.items():
        default = fields[name].default
        assert default in (None, dataclasses.MISSING) or default <= largest / 10, name


@pytest.mark.parametrize("minutes", [0, -1, 0.01, 1e300])
def test_a_time_limit_is_neither_nothing_nor_for_ever(minutes):
    with pytest.raises(UserError, match="timeout-minutes"):
        build_config(VALUES | {"distributed_timeout_minutes": minutes}, SSFTConfig)


def test_slow_work_has_at_least_the_time_of_a_collective():
    with pytest.raises(UserError, match="--slow-work-timeout-minutes 5: is below --distributed-timeout-minutes 30"):
        build_config(VALUES | {"slow_work_timeout_minutes": 5.0}, SSFTConfig)
    build_config(VALUES | {"slow_work_timeout_minutes": 5.0, "distributed_timeout_minutes": 0.5}, SSFTConfig)
