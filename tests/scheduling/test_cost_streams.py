"""Plans of the cost pass in token streams: every pair once, few and even streams, quickly made."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from megatron_ssft.records import QuestionBatch, QuestionVisit, TokenizedSet
from megatron_ssft.scheduling import (
    distinct_traces,
)
from tests.helpers.timing import calls_of, yardsticks
from tests.helpers.token_streams import (
    LARGE,
    SPECIAL,
    TEXT,
    TWO,
    WORK,
    check,
    cost_plan,
    feasible,
    heavy_tailed,
    large_step,
    make_batch,
    tree_size,
)


def in_line(batch, tags, cut):
    """(question, tag, trace) in line, equal traces once."""
    line = []
    for q, s in enumerate(batch.sets):
        cuts = [completion[:cut].tolist() for completion in s.completion_ids]
        traces = [j for j, c in enumerate(cuts) if c not in cuts[:j]]
        line += [(q, i, j) for i in range(len(tags.ids)) for j in traces]
    return line


@pytest.mark.parametrize("share", [True, False])
def test_cost_plan_on_random_workloads(share):
    rng = np.random.default_rng(9)
    same = 0
    for trial in range(200):
        ranks, v = int(rng.choice([1, 2, 3, 8, 16])), int(rng.choice([1, 2]))
        budget, cut = int(rng.choice([1, 64, 300, 1000, 5000])), int(rng.choice([1, 4, 50, 100000]))
        least, one = int(rng.choice([1, 1, 3])), bool(rng.integers(2))
        lengths = [heavy_tailed(rng, rng.integers(1, 9)) for _ in range(rng.integers(1, 7))]
        batch = make_batch(lengths, rng.integers(1, 301, len(lengths)).tolist(), rng)
        tags = TEXT if trial % 2 else SPECIAL
        plan = cost_plan(batch, tags, cut, ranks, budget, v, least, share_prompt=share, one_question=one)

        pads = check(plan, batch, tags, ranks=ranks, budget=budget, v=v, equal=v > 1, one=one, share=share)
        assert pads == plan.pad_lower_bound
        line = in_line(batch, tags, cut)
        same += len(line) < 8 * batch.num_traces
        place = {pair: k for k, pair in enumerate(line)}
        streams = [
            [place[s.question, s.tag, s.trace] for s in mb.sequences if not s.is_pad] for r in plan.ranks for mb in r
        ]
        streams = sorted(filter(None, streams))
        assert list(itertools.chain(*streams)) == list(range(len(line)))  # contiguous runs, everything once
        for s in plan.sequences:
            scored = min(len(batch.sets[s.question].completion_ids[s.trace]), cut)
            assert s.num_scored == scored
            assert s.num_tokens == len(batch.sets[s.question].prompt_ids) + len(tags.ids[s.tag]) + scored - 1
        counts = [len(rank) for rank in plan.ranks]
        if pads:
            assert len(streams) == len(line) and (v > 1 or len(line) < ranks == sum(counts))
        if len(line) >= -(-least // v) * v * ranks:
            assert min(counts) >= least
    assert same > 20


def fewest_runs(batch, tags, sequences, budget):
    count, start = 0, 0
    while start < len(sequences):
        stop = start + 1
        while stop < len(sequences) and tree_size(batch, tags, sequences[start : stop + 1]).tokens <= budget:
            stop += 1
        start, count = stop, count + 1
    return count


def test_cost_plan_has_as_few_streams_as_the_budget_allows():
    rng = np.random.default_rng(10)
    for ranks in (1, 2, 5):
        batch = make_batch([heavy_tailed(rng, 4) for _ in range(6)], [30] * 6, rng)
        plan = cost_plan(batch, TEXT, 100, ranks, 700)
        line = sorted(plan.sequences, key=lambda s: (s.question, s.tag, s.trace))
        least = fewest_runs(batch, TEXT, line, 700)
        assert sum(map(len, plan.ranks)) == -(-least // ranks) * ranks
        assert {len(rank) for rank in cost_plan(batch, TEXT, 100, ranks, 700, least=40 // ranks).ranks} == {40 // ranks}


def test_more_cost_streams_are_asked_for_than_there_are_pairs():
    batch = make_batch([[50, 40, 30, 20, 10]], [20], np.random.default_rng(17))
    assert [len(rank) for rank in cost_plan(batch, TWO, ranks=2, v=2, least=5).ranks] == [4, 4]  # 10 pairs, no PAD
    assert sorted(len(rank) for rank in cost_plan(batch, TWO, ranks=3, least=5).ranks) == [3, 3, 3]
    few = cost_plan(batch, TWO, ranks=6, v=2)
    assert [len(rank) for rank in few.ranks] == [2] * 6 and few.pad_sequences == 2


def test_cost_streams_are_as_even_as_any_cut_of_the_line():
    rng = np.random.default_rng(11)
    for _ in range(20):
        lengths = [rng.integers(1, 90, rng.integers(1, 4)).tolist() for _ in range(2)]
        batch = make_batch(lengths, rng.integers(1, 60, 2).tolist(), rng)
        plan = cost_plan(batch, TWO, 80, 3, 250)
        line = sorted(plan.sequences, key=lambda s: (s.question, s.tag, s.trace))
        count = sum(map(len, plan.ranks)) - plan.pad_sequences
        least = math.inf
        for cuts in itertools.combinations(range(1, len(line)), count - 1):
            runs = [line[a:b] for a, b in zip((0, *cuts), (*cuts, len(line)))]
            if feasible(batch, TWO, runs, 250, False):
                least = min(least, max(WORK.of(tree_size(batch, TWO, run)) for run in runs))
        heaviest = max(WORK.of(mb.size) for rank in plan.ranks for mb in rank)
        assert least * (1 - 1e-9) <= heaviest <= least * 1.002


def test_cost_plan_is_close_to_its_bound():
    for ranks, least in ((2, 1), (8, 1), (8, 4)):
        batch, _ = large_step(32, ranks)
        rng = np.random.default_rng(12)
        sets = [
            dataclasses.replace(
                s, completion_ids=tuple(rng.integers(0, 9, len(c), dtype=np.int32) for c in s.completion_ids)
            )
            for s in batch.sets
        ]
        batch = dataclasses.replace(batch, sets=tuple(sets))
        plan = cost_plan(batch, SPECIAL, 512, ranks, 32768, least=least, work=LARGE)
        assert plan.makespan <= 1.03 * plan.makespan_lower_bound


def test_many_pairs_are_planned_quickly():
    rng = np.random.default_rng(13)
    batch = make_batch([heavy_tailed(rng, 4, median=1000) for _ in range(250)], [200] * 250, rng)
    for ranks, budget, v in ((8, 32768, 1), (64, 8192, 2)):
        plan_it = functools.partial(cost_plan, batch, SPECIAL, 512, ranks, budget, v, 4)
        assert calls_of(plan_it) < 21 * 8000  # at most 19 for each pair when it was written
        plan, cost = yardsticks(plan_it, limit=10)
        assert len(plan.sequences) == 8000 and cost < 10  # 4.7 when it was written: 28 ms


def test_traces_that_agree_in_what_counts_are_scored_once():
    completions = ([1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 3, 5], [1, 2], [9])
    ids = tuple(np.array(c, dtype=np.int32) for c in completions)
    example = TokenizedSet("q", "s.jsonl", 1, np.zeros(4, dtype=np.int32), ids, (None,) * 6)
    assert distinct_traces(example, 2) == (0, 0, 0, 0, 0, 5)
    assert distinct_traces(example, 3) == (0, 1, 2, 0, 2, 5)
    assert distinct_traces(example, 4) == (0, 1, 2, 3, 2, 5)
    batch = QuestionBatch((QuestionVisit(0, 0), QuestionVisit(1, 0)), (example, example))
    plan = cost_plan(batch, TWO, 3)
    expected = {(q, i, j) for q in (0, 1) for i in (0, 1) for j in (0, 1, 2, 5)}  # not across questions
    assert {(s.question, s.tag, s.trace) for s in plan.sequences} == expected and len(plan.sequences) == 16
