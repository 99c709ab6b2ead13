"""Each trap is found in a configuration that has it, and not in one that has not."""

from __future__ import annotations

import pytest

from megatron_ssft.booking.book import account
from megatron_ssft.booking.memory import UNSEEN_BYTES
from megatron_ssft.booking.simulations import Job
from megatron_ssft.booking.survey import cut_epoch, survey
from megatron_ssft.booking.traps import find_traps
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import with_values
from megatron_ssft.parallel.simulated.records import Collective, Memory, SimulatedStep
from tests.helpers.bookings import prepared, section
from tests.helpers.training_runs import write_rows

GIB = 2**30
SOUND = {"sequence_parallel": True, "tensor_model_parallel_size": 2, "overlap_grad_reduce": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("run"), 48, **SOUND)


def traps(run, asked=None, state=20 * GIB, growing=5 * GIB, scored=0.1, **changes):
    """The traps of a layout, as if its simulation had counted so much. `scored`: FLOPs of scoring over training's."""
    config, dataset, vocabulary = run
    config = with_values(config, changes)
    asked = asked or DryRun(world_size=4, gpu="H100-80GB")
    parallel = config.run.parallel
    epoch = cut_epoch(config, dataset)
    planned = survey(config, dataset, vocabulary, epoch, asked.world_size // parallel.model_parallel_size)
    planned_flops = sum(planned.forward(planned.heaviest.training.ranks[planned.heaviest_rank]))
    flops = 4 * planned_flops / parallel.model_parallel_size
    parts = {"weights": state, "activations": growing}
    memory = Memory(state + growing, state, parts, {"weights": state}, ())
    messages = (Collective("reduce_scatter", "data", 2, True, 1, 10**9),)
    sections = [
        section("scoring", (), scored * flops, memory),
        section("training", messages, flops, memory),
    ]
    step = SimulatedStep(0, asked.world_size, 10**9, 0, "varlen", tuple(sections))
    job = Job(config, asked.world_size, asked.nodes_of, 0)
    booking = account(config, asked, vocabulary, epoch, planned, [job], [step])
    return tuple(find_traps(config, asked, dataset, planned, booking))


def found(all_traps, *beginnings):
    return [any(trap.startswith(beginning) for trap in all_traps) for beginning in beginnings]


def test_a_sound_layout_has_none(run):
    assert traps(run) == ()


def test_too_little_memory(run):
    (trap,) = traps(run, growing=70 * GIB)
    needed = 90 * 1.05 + UNSEEN_BYTES / GIB
    assert trap == (
        f"it does not fit: stage 0 needs {needed:.1f} GiB of 79.6 GiB; --recompute-granularity full or more GPUs or a "
        "shorter --seq-length"
    )
    (trap,) = traps(run, growing=70 * GIB, recompute_granularity="full")
    assert "--recompute-granularity" not in trap


def test_needless_recomputation(run):
    beginning = "recomputing is needless"
    assert found(traps(run, growing=5 * GIB, recompute_granularity="full"), beginning) == [True]
    assert found(traps(run, growing=20 * GIB, recompute_granularity="full"), beginning) == [False]  # x 4 layers
    assert found(traps(run, growing=5 * GIB), beginning) == [False]


def test_stages_that_wait(run):
    few = traps(run, pipeline_model_parallel_size=4, tensor_model_parallel_size=1, sequence_parallel=False)
    assert "of the pipeline's time stages wait: 4 of them share" in few[0]


def test_ranks_that_wait_for_the_slowest(tmp_path):
    def told(name, short):
        lengths = [180 if i % 3 == 0 else short for i in range(24)]
        rows = [{"id": f"q{i}", "question": "?", "traces": [{"text": "x" * n}]} for i, n in enumerate(lengths)]
        data = {"data_path": [write_rows(tmp_path / f"{name}.jsonl", rows)], "global_batch_size": 4}
        return traps(prepared(tmp_path, **SOUND | data), DryRun(world_size=8, gpu="H100-80GB"))

    assert any("of the time for the slowest" in trap for trap in told("unequal", 3))
    assert not any("of the time for the slowest" in trap for trap in told("equal", 180))


def test_pads(run):
    asked = DryRun(world_size=32, gpu="H100-80GB", nodes_of=32)
    (trap,) = [trap for trap in traps(run, asked) if "PAD" in trap]
    assert trap.startswith("4.0 PAD sequences a step on average")  # 12 traces on 16 ranks


def test_sequence_parallelism_and_the_optimizer(run):
    without = traps(run, sequence_parallel=False, use_distributed_optimizer=False)
    assert found(without, "no sequence parallelism", "every data-parallel rank keeps the whole optimizer") == [
        True,
        True,
    ]


def test_gradients_that_nothing_hides(run):
    assert found(traps(run, overlap_grad_reduce=False), "gradients are reduced when all else is done") == [True]


def test_tensor_parallelism_across_nodes_and_part_nodes(run):
    asked = DryRun(world_size=6, gpu="H100-80GB", nodes_of=4)
    assert found(traps(run, asked), "6 GPUs are no whole nodes of 4") == [True]
    single = DryRun(world_size=4, gpu="H100-80GB", nodes_of=1)
    assert found(traps(run, single), "tensor parallelism over 2 GPUs leaves the node of 1") == [True]


def test_matching_tokens(tmp_path, run):
    whole = traps(run, matching_tokens=200)
    assert found(whole, "--matching-tokens 200: 100% of the traces are not longer") == [True]
    rows = [
        {"id": f"q{i}", "question": "?", "traces": [{"text": f"the same beginning {j}" + "x" * 100} for j in "abcd"]}
        for i in range(24)
    ]
    changes = SOUND | {"data_path": [write_rows(tmp_path / "rows.jsonl", rows)]}
    alike = prepared(tmp_path, **changes)
    beginning = "--matching-tokens 16: in 24 of 24 questions looked at, traces that differ do not yet"
    assert found(traps(alike), beginning) == [True]
    assert found(traps(alike, matching_tokens=24), beginning.replace("16", "24")) == [False]


def test_traces_that_are_the_same_are_no_trap(tmp_path):
    rows = [{"id": f"q{i}", "question": "?", "traces": [{"text": "x" * 100}] * 4} for i in range(24)]
    run = prepared(tmp_path, **SOUND | {"data_path": [write_rows(tmp_path / "rows.jsonl", rows)]})
    assert not any("--matching-tokens" in trap for trap in traps(run))


def test_costly_matching(run):
    assert found(traps(run, scored=3.0), "matching takes") == [True]
    assert found(traps(run, scored=3.0, matching="random"), "matching takes") == [False]
