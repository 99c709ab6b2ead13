"""Closed formulas against the simulation: slices of a model tell what the whole model takes, at any layout."""

from __future__ import annotations

import pytest

from megatron_ssft.booking.book import jobs_of
from megatron_ssft.booking.longest import longest_that_fits
from megatron_ssft.booking.memory import StageMemory, stage_memory
from megatron_ssft.booking.simulations import Job, run_all, simulated_stages
from megatron_ssft.booking.slices import DEPTHS, SliceJob, estimate, least_peak
from megatron_ssft.booking.step_time import average_step, step_time
from megatron_ssft.booking.survey import cut_epoch, survey
from megatron_ssft.config.flags import with_values
from megatron_ssft.config.gpus import Gpu
from tests.helpers.bookings import ASKED, prepared

pytestmark = pytest.mark.slow

SHAPE = {
    "num_layers": 8,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "seq_length": 4096,
    "vocab_size": 32000,
    "swiglu": True,
}
LAYOUTS = {
    "alone": (1, 1, 1, None),
    "alone, recomputed": (1, 1, 1, "full"),
    "tensor, selective": (2, 1, 1, "selective"),
    "tensor, data": (2, 1, 4, "full"),
    "stages": (1, 2, 2, None),
    "all of it": (4, 4, 2, "full"),
}
"""Tensor, pipeline and data-parallel sizes, and what is recomputed."""


def layout_of(config, tp, pp, recompute):
    changes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": tp > 1,
        "recompute_granularity": recompute,
    }
    return with_values(config, changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("run"), 24, 3600, **SHAPE)


@pytest.fixture(scope="module")
def steps(run):
    """{layout: (configuration, survey, slices, simulated stages)}"""
    config, dataset, vocabulary = run
    epoch = cut_epoch(config, dataset)
    tokens = int(epoch.longest.max())
    tasks, parts = [], {}
    for name, (tp, pp, dp, recompute) in LAYOUTS.items():
        changed = layout_of(config, tp, pp, recompute)
        planned = survey(changed, dataset, vocabulary, epoch, dp)
        jobs = jobs_of(changed, tp * pp * dp, ASKED, planned)
        parts[name] = changed, planned, len(jobs)
        tasks += [SliceJob(changed, 8, tokens, vocabulary.size, vocabulary.tags.row_ids), *jobs]
    results = iter(run_all(tasks))
    return {
        name: (changed, planned, next(results), [next(results) for _ in range(count)])
        for name, (changed, planned, count) in parts.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_and_time_are_near_the_simulations(steps, name):
    config, planned, slices, simulated = steps[name]
    _, pp, _, _ = LAYOUTS[name]
    world_size = simulated[0].world_size
    estimated = estimate(config.run, world_size, 8, planned, slices)
    # The estimate is of a stage that is first and last in one: no real stage is fuller, and one is nearly so.
    peak = max(step.peak for step in simulated)
    assert 0.97 * peak <= estimated.peak <= (1.05 if pp == 1 else 1.35) * peak
    assert least_peak(config.run, world_size, slices) <= 1.01 * peak
    averages = [average_step(planned, each, config.run) for each in ([estimated], simulated)]
    for figure in ("matching_flops", "training_flops"):
        near = pytest.approx(getattr(averages[1], figure), rel=0.03)
        assert getattr(averages[0], figure) == near
    times = [step_time(average, each, config.run, ASKED) for average, each in zip(averages, ([estimated], simulated))]
    assert times[0].total == pytest.approx(times[1].total, rel=0.05)
    assert times[0].tensor == pytest.approx(times[1].tensor, rel=0.1)
    assert times[0].pipeline == pytest.approx(times[1].pipeline, rel=0.1)
    assert times[0].data == pytest.approx(times[1].data, rel=0.1)


def test_no_stage_between_needs_more_than_the_second(run):
    """So it is enough to simulate three of them."""
    config, dataset, vocabulary = run
    deep = layout_of(config, 1, 8, "full")
    planned = survey(deep, dataset, vocabulary, cut_epoch(deep, dataset), 1)
    number, rank = planned.heaviest.number, planned.heaviest_rank
    peaks = [step.peak for step in run_all([Job(deep, 8, 8, stage, rank, number) for stage in range(8)])]
    assert simulated_stages(8) == [0, 1, 7]
    assert max(peaks[2:7]) <= peaks[1]


@pytest.mark.parametrize("recompute", [None, "full"])
def test_the_longest_sequence_that_fits(run, recompute):
    """Simulated with a sequence of just that length, the GPU is just full."""
    config, _, vocabulary = run
    config = with_values(config, {"recompute_granularity": recompute, "num_layers": DEPTHS[1]})

    def simulated(tokens):
        (slices,) = run_all([SliceJob(config, 8, tokens, vocabulary.size, vocabulary.tags.row_ids)])
        return stage_memory(0, slices.deep, Gpu(1, 12288, 1, 1, 1))

    tokens = longest_that_fits(config, 8, vocabulary, simulated(3000), 3000)
    assert tokens > 9000
    full = simulated(tokens)
    assert abs(full.margin) <= 0.01 * full.gpu


def test_where_the_state_fills_the_gpu_nothing_fits(run):
    config, _, vocabulary = run
    memory = StageMemory(0, 0, {"weights": 80 << 30, "activations": 1 << 30}, 81 << 30, 80 << 30, 90 << 30, 80 << 30)
    assert longest_that_fits(config, 8, vocabulary, memory, 3000) == 0
