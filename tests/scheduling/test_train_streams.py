"""Plans of training in token streams cover everything once, keep the budget, and are even."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest

from megatron_ssft.scheduling.sequences import train_sequences
from tests.helpers.timing import calls_of, yardsticks
from tests.helpers.token_streams import (
    LARGE,
    SPECIAL,
    TEXT,
    WORK,
    check,
    cost_plan,
    feasible,
    heavy_tailed,
    large_step,
    make_batch,
    make_step,
    random_step,
    set_partitions,
    small_step,
    token_tree_size,
    train_plan,
    tree_size,
)


def test_train_plan_on_a_thousand_workloads():
    rng = np.random.default_rng(0)
    without_doubt = 0
    for trial in range(1000):
        ranks, v = int(rng.choice([1, 2, 4, 8, 16])), int(rng.choice([1, 2]))
        budget = int(rng.choice([1, 64, 150, 200, 300, 400, 1000, 5000, 40000]))
        equal, one, share = bool(rng.integers(2)), rng.random() < 0.3, rng.random() < 0.8
        batch, assignments = step = random_step(rng)
        tags = TEXT if trial % 2 else SPECIAL
        plan = train_plan(step, tags, ranks, budget, v, equal, share_prompt=share, one_question=one)

        pads = check(plan, batch, tags, ranks=ranks, budget=budget, v=v, equal=equal, one=one, share=share)
        assert pads == plan.pad_lower_bound
        if not equal:
            assert pads == max(0, ranks - batch.num_traces)
        elif batch.num_traces % (ranks * v) == 0 or budget == 40000:
            without_doubt += 1
            assert pads == max(0, ranks * v - batch.num_traces) or one
        expected = {
            (q, j): (tag, len(s.prompt_ids) + len(tags.ids[tag]) + len(s.completion_ids[j]) - 1)
            for q, (s, assignment) in enumerate(zip(batch.sets, assignments))
            for j, tag in enumerate(assignment.tags)
        }
        assert len(plan.sequences) == len(expected)
        assert {(s.question, s.trace): (s.tag, s.num_tokens) for s in plan.sequences} == expected
    assert without_doubt > 50


def test_sizes_are_those_of_the_tree_of_tokens():
    rng = np.random.default_rng(1)
    for _ in range(20):
        batch, assignments = random_step(rng, most_questions=5)
        plan = train_plan((batch, assignments), TEXT, 2, 1500)
        for mb in plan.ranks[0] + plan.ranks[1]:
            if not mb.sequences[0].is_pad:
                assert (mb.size.tokens, mb.size.pairs) == token_tree_size(batch, TEXT, mb.sequences)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("options", [{}, {"equal": True}, {"equal": True, "v": 2}])
def test_makespan_is_close_to_its_bound(seed, options):
    plan = train_plan(large_step(32, seed), ranks=8, work=LARGE, **options)
    assert plan.makespan <= 1.02 * plan.makespan_lower_bound
    assert len(plan.sequences) == 128 and plan.pad_sequences == 0


@pytest.mark.parametrize(("questions", "ranks", "limit"), [(32, 2, 1.01), (32, 4, 1.01), (32, 16, 1.02), (8, 8, 1.03)])
def test_makespan_on_other_numbers_of_ranks(questions, ranks, limit):
    plans = [train_plan(large_step(questions, seed), ranks=ranks, work=LARGE) for seed in range(20)]
    assert np.mean([plan.makespan / plan.makespan_lower_bound for plan in plans]) <= limit


@pytest.mark.parametrize("budget", [4096, 32768])
def test_large_batches_are_planned_quickly(budget):
    step = large_step(1024, 0)
    for ranks, equal in itertools.product((8, 64), (False, True)):
        arguments = {"ranks": ranks, "budget": budget, "equal": equal, "work": LARGE}
        plan_it = functools.partial(train_plan, step, **arguments)
        assert calls_of(plan_it) < 68 * 4096  # at most 61 for each trace when it was written
        plan, cost = yardsticks(plan_it, limit=16)
        assert cost < 16  # 8 when it was written: 45 ms; half as much again beside other programs
        assert budget < 32768 or plan.makespan <= 1.01 * plan.makespan_lower_bound


def test_pads_where_every_trace_needs_a_stream():
    """Too many for a search, which is not needed."""
    step = make_step([[600, 601]] * 200 + [[610]] * 3, [10] * 203, np.random.default_rng(14))
    plan = train_plan(step, ranks=8, budget=1000, v=2, equal=True)
    assert {len(rank) for rank in plan.ranks} == {52}
    assert plan.pad_sequences == plan.pad_lower_bound == -403 % 16


def test_makespan_against_every_plan():
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(25):
        batch, assignments = step = small_step(rng, most=6)
        budget = int(rng.integers(80, 300))
        least = math.inf
        for streams in set_partitions(train_sequences(*step, TEXT)):
            if not feasible(batch, TEXT, streams, budget, False):
                continue
            works = [WORK.of(tree_size(batch, TEXT, stream)) for stream in streams]
            total = sum(works)
            for chosen in itertools.product((0, 1), repeat=len(works)):
                first = sum(work for work, mine in zip(works, chosen) if mine)
                if 0 < sum(chosen) < len(works):
                    least = min(least, max(first, total - first))
        if least < math.inf:
            plan = train_plan(step, TEXT, 2, budget)
            assert plan.makespan >= least * (1 - 1e-9) and plan.makespan_lower_bound <= least * (1 + 1e-9)
            ratios.append(plan.makespan / least)
    assert len(ratios) >= 20 and np.mean(ratios) < 1.02 and max(ratios) < 1.12


def test_questions_stay_together_where_nothing_divides_them():
    rng = np.random.default_rng(5)
    step = make_step([heavy_tailed(rng, 4, median=5000, sigma=0.5) for _ in range(128)], [200] * 128, rng)
    plan = train_plan(step, ranks=8, work=LARGE)
    prompts = sum(len({s.question for s in mb.sequences}) for rank in plan.ranks for mb in rank)
    needed = sum(
        math.ceil((sum(map(len, s.completion_ids)) - 4) / (32768 - 200)) for s in step[0].sets
    )  # times a question has to stand somewhere, by its tokens
    assert needed <= prompts <= needed + 16
    assert sum(map(len, train_plan(step, budget=10**9).ranks)) == 1


def test_traces_of_one_question_keep_all_ranks_busy():
    batch, assignments = step = make_step([[9000, *[3] * 7]], [50], np.random.default_rng(6))
    for equal in (False, True):
        plan = train_plan(step, ranks=8, equal=equal)
        assert [len(rank) for rank in plan.ranks] == [1] * 8 and plan.pad_sequences == 0
        assert plan.makespan == plan.makespan_lower_bound  # the long one alone


def test_one_sequence_longer_than_the_budget_stands_alone():
    rng = np.random.default_rng(7)
    plan = train_plan(make_step([[500, 20, 20], [30, 20]], [10, 10], rng), budget=200)
    assert sorted(len(mb.sequences) for mb in plan.ranks[0]) == [1, 4]


def test_plans_are_functions_of_their_arguments():
    rng = np.random.default_rng(8)
    for budget, equal in ((300, True), (3000, False)):
        step = random_step(rng)
        plans = [train_plan(step, TEXT, 4, budget, 2, equal) for _ in range(2)]
        assert plans[0] == plans[1]
        assert cost_plan(step[0], ranks=4, budget=budget) == cost_plan(step[0], ranks=4, budget=budget)


def test_nothing_to_plan_is_refused():
    with pytest.raises(ValueError, match="no traces"):
        train_plan((make_batch([], []), []))
    with pytest.raises(ValueError, match="no traces"):
        cost_plan(make_batch([], []))
