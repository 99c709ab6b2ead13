"""Plans for pipeline stages: busier stages, no PAD and no tiny stream more, and nothing new without stages."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import random

import numpy as np
import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.records import Assignment
from megatron_ssft.scheduling import (
    RowLimits,
    StreamLayout,
    StreamLimits,
    plan_cost_rows,
    plan_cost_streams,
    plan_train_rows,
    plan_train_streams,
)
from megatron_ssft.scheduling.pipeline_time import Pipeline, pipeline_time
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.scheduling.sequences import train_sequences
from tests.helpers.timing import calls_of, yardsticks
from tests.helpers.token_streams import (
    LARGE,
    SPECIAL,
    TEXT,
    WORK,
    check,
    feasible,
    heavy_tailed,
    large_step,
    make_batch,
    make_step,
    random_step,
    set_partitions,
    small_step,
    tree_size,
)


def limits_of(ranks, budget=32768, stages=1, chunks=1, ratio=3.0, smallest=1024, **options):
    """Streams of at most `budget` tokens in a pipeline; interleaved, counts are equal multiples of the stages."""
    interleaved = chunks > 1
    return StreamLimits(
        ranks,
        budget,
        group_size=stages if interleaved else 1,
        equal_counts=interleaved,
        pipeline=Pipeline(stages, chunks, ratio),
        smallest_stream=smallest,
        layout=StreamLayout(**options),
    )


def without_stages(limits):
    return dataclasses.replace(limits, pipeline=Pipeline())


def rank_times(plan, limits, work=WORK):
    stages, chunks, ratio = dataclasses.astuple(limits.pipeline)
    works = [[work.of(mb.size) for mb in rank] for rank in plan.ranks]
    return [pipeline_time(of, stages, chunks, ratio) for of in works]


def plan_time(plan, limits, work=WORK):
    return max(of.time for of in rank_times(plan, limits, work))


def idle_share(plan, limits, work=WORK):
    """Idle time of all stages of all ranks until the last is done, over that time."""
    busy = sum(work.of(mb.size) for mb in streams_of(plan)) * (1 + limits.pipeline.backward_ratio)
    return 1 - busy / (limits.pipeline.stages * len(plan.ranks) * plan_time(plan, limits, work))


def streams_of(plan):
    return [mb for rank in plan.ranks for mb in rank]


# -- without stages --------------------------------------------------------------------------------------------------


def steps_of_known_numbers():
    """Steps from the standard library's generator, whose numbers are promised to stay."""
    rng = random.Random(15)
    for _ in range(40):
        counts = [rng.randrange(1, 7) for _ in range(rng.randrange(1, 13))]
        lengths = [[rng.randrange(1, rng.choice((50, 500, 4000))) for _ in range(count)] for count in counts]
        prompts = [rng.randrange(1, 300) for _ in lengths]
        tags = [Assignment(tuple(rng.randrange(8) for _ in of)) for of in lengths]
        yield (make_batch(lengths, prompts), tags), rng.choice((1, 2, 4)), rng.choice((300, 2000, 9000))


def test_without_stages_plans_are_what_they_were_before_there_was_a_pipeline():
    digest = hashlib.sha256()
    for (batch, assignments), ranks, budget in steps_of_known_numbers():
        streams, rows = StreamLimits(ranks, budget), RowLimits(ranks, 2, budget)
        for plan in (
            plan_train_streams(batch, assignments, SPECIAL, streams, WORK),
            plan_train_streams(batch, assignments, TEXT, dataclasses.replace(streams, equal_counts=True), WORK),
            plan_cost_streams(batch, 500, SPECIAL, streams, WORK),
            plan_train_rows(batch, assignments, SPECIAL, rows, WORK),
            plan_cost_rows(batch, 500, TEXT, rows, WORK),
        ):
            assert plan.idle_share == 0
            figures = (plan.pad_sequences, plan.pad_lower_bound, plan.makespan, plan.makespan_lower_bound, plan.layout)
            digest.update(repr((plan.ranks, figures)).encode())
    assert digest.hexdigest() == "8b3e6948235ee39c08a8d3e692b91c4c27136f9bd9abf9fbf911264c0dce29e0"


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2])
def test_training_plans_on_random_workloads(chunks):
    rng = np.random.default_rng(chunks)
    split = faster = 0
    for trial in range(120):
        ranks, stages = int(rng.choice([1, 2, 3, 8])), int(rng.choice([2, 3, 4, 8]))
        budget, smallest = int(rng.choice([200, 400, 1000, 5000, 40000])), int(rng.choice([1, 50, 150, 500]))
        one, share = rng.random() < 0.3, rng.random() < 0.8
        limits = limits_of(ranks, budget, stages, chunks, 2 + trial % 2, smallest, one_question=one, share_prompt=share)
        batch, assignments = step = random_step(rng)
        tags = TEXT if trial % 2 else SPECIAL
        plan, plain = (plan_train_streams(*step, tags, of, WORK) for of in (limits, without_stages(limits)))

        v, equal = limits.group_size, limits.equal_counts
        alike = {"ranks": ranks, "budget": budget, "v": v, "equal": equal, "one": one, "share": share}
        assert check(plan, batch, tags, **alike, heaviest_first=False) == plain.pad_sequences
        assert plan.pad_lower_bound == plain.pad_lower_bound
        assert sorted((s.question, s.trace) for s in plan.sequences) == [
            (q, j) for q, of in enumerate(batch.sets) for j in range(of.num_traces)
        ]
        small, small_before = (sum(mb.size.tokens < smallest for mb in streams_of(p)) for p in (plan, plain))
        assert small <= small_before
        times = rank_times(plan, limits)
        assert plan.idle_share == pytest.approx(idle_share(plan, limits))
        assert max(times).time <= 1.01 * plan_time(plain, limits)  # estimated by fewer orders than are tried at last
        split += len(streams_of(plan)) > len(streams_of(plain))
        faster += max(times).time < 0.97 * plan_time(plain, limits)
        assert plan == plan_train_streams(*step, tags, limits, WORK)
    assert split > 16 and faster > 30, (split, faster)


@pytest.mark.parametrize(
    ("ranks", "stages", "chunks", "most", "mean_limit", "limit"),
    [(1, 2, 1, 6, 1.03, 1.1), (1, 4, 1, 6, 1.03, 1.1), (2, 2, 1, 6, 1.03, 1.12), (2, 4, 1, 5, 1.03, 1.12),
     (1, 2, 2, 6, 1.03, 1.15), (2, 2, 2, 6, 1.04, 1.15)],
)  # fmt: skip
def test_time_against_every_plan_in_every_order(ranks, stages, chunks, most, mean_limit, limit):
    """All packings into streams, all ways to give them to ranks, all orders: at 3% of the best, 4% interleaved."""
    rng = np.random.default_rng(3)
    ratios, before = [], []
    for _ in range(22):
        batch, assignments = step = small_step(rng, most)
        limits = limits_of(ranks, int(rng.integers(80, 300)), stages, chunks, smallest=1)
        least = least_time(step, limits)
        plan = plan_train_streams(*step, TEXT, limits, WORK)
        if least == math.inf or plan.pad_sequences:
            continue
        assert plan_time(plan, limits) >= least * (1 - 1e-9)
        ratios.append(plan_time(plan, limits) / least)
        before.append(plan_time(plan_train_streams(*step, TEXT, without_stages(limits), WORK), limits) / least)
    assert len(ratios) >= 8 and np.mean(ratios) < mean_limit and max(ratios) < limit
    assert chunks > 1 or np.mean(before) > 1.08


def least_time(step, limits):
    """The least time of any plan without PADs."""
    num_ranks, pipeline = limits.num_ranks, limits.pipeline

    @functools.cache
    def in_best_order(works):
        return min(map(pipeline.time, set(itertools.permutations(works))))

    least = math.inf
    for streams in set_partitions(train_sequences(*step, TEXT)):
        if not feasible(step[0], TEXT, streams, limits.max_tokens, False):
            continue
        works = sorted(WORK.of(tree_size(step[0], TEXT, stream)) for stream in streams)
        for chosen in itertools.product(range(num_ranks), repeat=len(works)):
            ranks = [[work for work, rank in zip(works, chosen) if rank == r] for r in range(num_ranks)]
            counts = set(map(len, ranks))
            if 0 in counts or (limits.equal_counts and (len(counts) > 1 or counts.pop() % pipeline.stages)):
                continue
            if max(map(sum, ranks)) * (1 + pipeline.backward_ratio) / pipeline.stages < least:
                least = min(least, max(in_best_order(tuple(works)) for works in ranks))
    return least


def lognormal_step(seed, questions=8, prompt=200):
    """4 traces per question of 8,000 tokens in the mean, up to 32,000."""
    rng = np.random.default_rng([seed, questions, prompt])
    lengths = [heavy_tailed(rng, 4, 8000 / math.exp(0.18), 0.6) for _ in range(questions)]
    return make_step(lengths, [prompt] * questions, rng)


@pytest.mark.parametrize(
    ("stages", "chunks", "ranks", "share"), [(2, 1, 2, 0.95), (4, 1, 1, 0.92), (4, 1, 2, 0.87), (4, 2, 2, 0.97)]
)
def test_less_time_where_32_traces_leave_stages_idle(stages, chunks, ranks, share):
    limits = limits_of(ranks, stages=stages, chunks=chunks)
    ratios, repeated = [], []
    for seed in range(8):
        step = lognormal_step(seed)
        plan, plain = (plan_train_streams(*step, SPECIAL, of, LARGE) for of in (limits, without_stages(limits)))
        ratios.append(plan_time(plan, limits, LARGE) / plan_time(plain, limits, LARGE))
        repeated.append(LARGE.of(plan.size) / LARGE.of(plain.size) - 1)
        assert min(mb.size.tokens for mb in streams_of(plan)) >= 1024
    assert np.mean(ratios) < share and np.mean(repeated) < 0.02


def test_streams_are_not_split_where_that_costs_more_than_it_saves():
    """Two questions of two traces behind a long prompt: apart, each trace would need its own."""
    step = make_step([[2000, 2000]] * 8, [8000] * 8, np.random.default_rng(0))
    limits = limits_of(1, budget=13000, stages=2)
    plan = plan_train_streams(*step, SPECIAL, limits, LARGE)
    assert [len(mb.sequences) for mb in plan.ranks[0]] == [2] * 8
    cheap = make_step([[10000, 10000]] * 2, [10] * 2, np.random.default_rng(0))
    plan = plan_train_streams(*cheap, SPECIAL, limits_of(1, stages=2), LARGE)
    assert [len(mb.sequences) for mb in plan.ranks[0]] == [1] * 4


def test_no_stream_becomes_smaller_than_allowed():
    step = make_step([[900, 900, 900, 900]], [10], np.random.default_rng(0))
    for smallest, counts in ((1024, [2, 2]), (2000, [4]), (900, [1] * 4)):
        plan = plan_train_streams(*step, SPECIAL, limits_of(1, stages=4, smallest=smallest), LARGE)
        assert [len(mb.sequences) for mb in plan.ranks[0]] == counts


@pytest.mark.parametrize(("stages", "chunks"), [(4, 1), (8, 1), (4, 2)])
def test_plans_for_a_pipeline_are_made_quickly(stages, chunks):
    step, limits = lognormal_step(0), limits_of(2, stages=stages, chunks=chunks)
    plan_it = functools.partial(plan_train_streams, *step, SPECIAL, limits, LARGE)
    assert calls_of(plan_it) < 200_000  # at most 134,000 when it was written
    assert yardsticks(plan_it, limit=5)[1] < 5  # at most 2.2 when it was written: 11 ms
    large, limits = large_step(1024, 0), limits_of(8, stages=stages, chunks=chunks)
    plan_it = functools.partial(plan_train_streams, *large, SPECIAL, limits, LARGE)
    assert calls_of(plan_it) < 1000 * 4096  # at most 720 for each trace when it was written: 0.1 to 0.5 s


# -- the order of microbatches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "chunks", "limit"), [(2, 1, 1.01), (4, 1, 1.015), (8, 1, 1.015), (2, 2, 1.02)])
def test_order_against_every_order(stages, chunks, limit):
    rng = np.random.default_rng(stages)
    pipeline, ratios, gains = Pipeline(stages, chunks, 3.0), [], []
    for _ in range(15):
        works = rng.lognormal(0, 0.6, 6).tolist()
        order = pipeline.order(works)
        assert sorted(order) == list(range(6))
        time = pipeline.time([works[k] for k in order])
        ratios.append(time / min(map(pipeline.time, itertools.permutations(works))))
        gains.append(time / pipeline.time(sorted(works, reverse=True)))
        assert time <= pipeline.quick_time(works) * (1 + 1e-9)
    assert np.mean(ratios) < limit and max(ratios) < 1.08
    assert max(gains) <= 1 + 1e-9 and np.mean(gains) < 0.99


def test_the_heaviest_comes_first_where_the_order_does_not_matter():
    for pipeline in (Pipeline(), Pipeline(4, 1, 0.0), Pipeline(1, 1, 3.0)):
        assert pipeline.order([2.0, 5.0, 1.0, 5.0, 3.0]) == [1, 3, 4, 0, 2]


def test_rows_change_their_order_alone():
    rng = np.random.default_rng(4)
    for chunks in (1, 2):
        pipeline = Pipeline(4, chunks, 2.0)
        batch, assignments = random_step(rng)
        limits = RowLimits(2, 2, 5000, 4 if chunks > 1 else 1, pipeline)
        plain = dataclasses.replace(limits, pipeline=Pipeline())
        for plan_rows in (plan_train_rows, plan_cost_rows):
            second = assignments if plan_rows is plan_train_rows else 40
            plan, before = (plan_rows(batch, second, SPECIAL, of, WORK) for of in (limits, plain))
            for rank, rank_before in zip(plan.ranks, before.ranks, strict=True):
                assert sorted(rank, key=str) == sorted(rank_before, key=str)
            assert plan_time(plan, limits) <= plan_time(before, limits) * (1 + 1e-9)
            assert plan.idle_share == pytest.approx(idle_share(plan, limits)) and plan.idle_share > 0


# -- the cost pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [200, 3000])
@pytest.mark.parametrize(("stages", "chunks", "ranks"), [(2, 1, 8), (4, 1, 2), (8, 1, 4), (4, 2, 2)])
def test_cost_pass_against_every_number_of_streams(stages, chunks, ranks, prompt):
    rng = np.random.default_rng(prompt)
    batch = make_batch([heavy_tailed(rng, 4, median=5000) for _ in range(4)], [prompt] * 4, rng)
    limits = limits_of(ranks, 16384, stages, chunks, 0.0)
    plan = plan_cost_streams(batch, 700, SPECIAL, limits, LARGE)
    counts = range(limits.group_size, 129 // ranks, limits.group_size)
    plain = without_stages(limits)
    asked = [dataclasses.replace(plain, min_microbatches=number) for number in counts]
    others = [plan_cost_streams(batch, 700, SPECIAL, of, LARGE) for of in asked]
    fewest = len(streams_of(others[0]))
    allowed = [p for p in others if len(streams_of(p)) <= max(p.size.tokens // 1024, fewest)]
    assert plan_time(plan, limits, LARGE) <= 1.04 * min(plan_time(p, limits, LARGE) for p in allowed)
    assert plan.pad_sequences == 0 and {len(rank) % limits.group_size for rank in plan.ranks} == {0}
    assert plan.idle_share == pytest.approx(idle_share(plan, limits, LARGE))


def test_many_pairs_for_a_pipeline_are_planned_quickly():
    rng = np.random.default_rng(13)
    batch = make_batch([heavy_tailed(rng, 4, median=1000) for _ in range(250)], [200] * 250, rng)
    plan_it = functools.partial(plan_cost_streams, batch, 512, SPECIAL, limits_of(8, 32768, 8, 1, 0.0), LARGE)
    assert calls_of(plan_it) < 110 * 8000  # 87 for each pair when it was written: 130 ms


# -- the planner -----------------------------------------------------------------------------------------------------


def config_of(**changes):
    values = {
        "num_layers": 16, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "seq_length": 32768,
        "global_batch_size": 32, "train_iters": 5, "lr": 1e-4, "tokenizer_type": "CharTokenizer", "data_path": ["x"],
    }  # fmt: skip
    return build_config(values | changes, SSFTConfig).run


@pytest.mark.parametrize(
    ("changes", "pipeline"),
    [
        ({}, Pipeline()),
        ({"pipeline_model_parallel_size": 4}, Pipeline(4, 1, 2.0)),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}, Pipeline(2, 4, 2.0)),
        ({"pipeline_model_parallel_size": 4, "recompute_granularity": "full"}, Pipeline(4, 1, 3.0)),
        ({"pipeline_model_parallel_size": 4, "recompute_granularity": "selective"}, Pipeline(4, 1, 2.0)),
        (
            {"pipeline_model_parallel_size": 4, "recompute_granularity": "full", "recompute_method": "block"},
            Pipeline(4, 1, 2.25),
        ),
    ],
)
def test_planner_knows_the_pipeline(changes, pipeline):
    planner = Planner(config_of(**changes), 100, 2)
    assert planner.pipeline == planner.train_streams.pipeline == pipeline
    assert planner.cost_streams.pipeline == dataclasses.replace(pipeline, backward_ratio=0.0)
    batch, assignments = lognormal_step(1)
    plan = planner.plan_sequences(batch, assignments, SPECIAL).plan
    assert planner.idle_share([plan]) == pytest.approx(plan.idle_share)
    assert (plan.idle_share > 0) == (pipeline.stages > 1)
    both = planner.idle_share([plan, plan])  # one pass over twice as many microbatches
    assert both <= plan.idle_share * (1 + 1e-9)
    padded = Planner(config_of(**changes, sequence_layout="padded"), 100, 2)
    assert (padded.plan_sequences(batch, assignments, SPECIAL).plan.idle_share > 0) == (pipeline.stages > 1)
