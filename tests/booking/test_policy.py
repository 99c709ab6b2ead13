"""Policy learning is answered by its first step."""

from __future__ import annotations

import pytest

from megatron_ssft.booking.answers import answer_policy
from megatron_ssft.booking.policy import book_policy
from megatron_ssft.booking.tables import booking_lines
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import with_values
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from tests.helpers.config_flags import refusal
from tests.helpers.policy_runs import policy_config, run_values, write_inputs
from tests.helpers.simulated_steps import MODEL

ASKED = DryRun(world_size=4, gpu="H200")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = run_values(folder, "untied special", write_inputs(folder), folder / "run", questions_per_step=6)
    return run | MODEL | {"bf16": True, "tensor_model_parallel_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"objective": "gfpo-exact", "anchor": "kl", "anchor_completions": 6}, {"objective": "grpo", "anchor": "none"}],
    ids=["gfpo", "grpo"],
)
def test_the_first_step_is_told(values, changes):
    config = policy_config(values | changes)
    booking = book_policy(config, 4, ASKED, build_vocabulary(config.run))
    assert booking.fits and booking.heaviest_step == 0
    assert booking.average.training_flops > 0 and (booking.average.matching_flops > 0) == (
        "anchor_completions" in changes
    )
    assert booking.run.steps == config.train_iters
    assert booking.time.waiting == 0 and booking.time.tensor > 0
    assert [trap.partition(":")[0] for trap in booking.traps[:2]] == [
        "no sequence parallelism",
        "every data-parallel rank keeps the whole optimizer; --use-distributed-optimizer divides it by 2",
    ]
    assert booking.traps[2].startswith("gradients are reduced when all else is done")
    lines = booking_lines(booking)
    assert any(line.startswith("memory in GiB at the first step; ") for line in lines)
    assert not any("tokens/s" in line for line in lines)


@pytest.mark.slow
def test_with_stages_there_is_no_time(values):
    config = policy_config(values | {"objective": "grpo", "anchor": "none", "pipeline_model_parallel_size": 2})
    booking = book_policy(config, 4, ASKED, build_vocabulary(config.run))
    assert [memory.stage for memory in booking.memory] == [0, 1]
    assert booking.time is None and booking.run is None
    assert not any("hours" in line for line in booking_lines(booking))


def test_nothing_asked_nothing_told(values):
    config = policy_config(values)
    assert answer_policy(config, DryRun(), build_vocabulary(config.run)) == []


def test_advice_is_for_training(values):
    config = policy_config(values)
    text = refusal(lambda: answer_policy(config, DryRun(gpu="H200", advise=True), build_vocabulary(config.run)))
    assert text.startswith("--advise: is for train")
    assert with_values(config, {"lr": 0.5}).run.training.lr == 0.5
