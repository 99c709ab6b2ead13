"""Plans cover everything once, need no PAD too many, and keep the ranks evenly busy."""

from __future__ import annotations

import collections
import functools
import itertools
import math

import numpy as np
import pytest

from megatron_ssft.config import ModelConfig
from megatron_ssft.matching import Matcher
from megatron_ssft.records import PAD, ForkingTokens, QuestionBatch, QuestionVisit, Size, TokenizedSet
from megatron_ssft.scheduling import RowLimits, WorkModel, plan_cost_rows, plan_train_rows
from megatron_ssft.scheduling.balance import balance, makespan_lower_bound
from tests.helpers.timing import calls_of, yardsticks

WORK = WorkModel(token=1.0, pair=4e-5, scored=0.0)
SPECIAL = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 9)), tuple((900 + i,) for i in range(8)), "special")
TEXT = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 9)), tuple((5,) * (3 + i % 2) for i in range(8)), "text")


def make_batch(trace_lengths, prompts=None):
    """A batch from completion lengths: one list a question."""
    sets = tuple(
        TokenizedSet(
            id=f"q{k}",
            file="set.jsonl",
            line=k + 1,
            prompt_ids=np.zeros(prompts[k] if prompts else 10, dtype=np.int32),
            completion_ids=tuple(np.zeros(n, dtype=np.int32) for n in lengths),
            sources=(None,) * len(lengths),
        )
        for k, lengths in enumerate(trace_lengths)
    )
    return QuestionBatch(tuple(QuestionVisit(k, 0) for k in range(len(sets))), sets)


def alone(num_tokens, work=WORK):
    """Work of one sequence without its head."""
    return work.token * num_tokens + work.pair * num_tokens * (num_tokens + 1) / 2


def heavy_tailed(rng, size, mean=60.0, sigma=1.0, longest=32768):
    return np.clip(rng.lognormal(math.log(mean), sigma, size), 1, longest).astype(int).tolist()


def assign(batch, seed=0):
    return Matcher("random", 8, seed).assign(batch, [None] * len(batch.sets))


def train_plan(batch, assignments=None, tags=SPECIAL, ranks=1, b=1, v=1, work=WORK):
    assignments = assign(batch) if assignments is None else assignments
    return plan_train_rows(batch, assignments, tags, RowLimits(ranks, b, group_size=v), work)


def cost_plan(batch, tags=SPECIAL, matching_tokens=1000, ranks=1, budget=4096, v=1, work=WORK):
    return plan_cost_rows(batch, matching_tokens, tags, RowLimits(ranks, max_tokens=budget, group_size=v), work)


def check_report(plan, work=WORK):
    """PAD count, makespan and bound as they follow from the plan itself."""
    microbatches = [mb for rank in plan.ranks for mb in rank]
    assert plan.pad_sequences == sum(s == PAD for mb in microbatches for s in mb.sequences)
    assert PAD.num_tokens == 1
    each = [[len(mb.sequences) * alone(max(s.num_tokens for s in mb.sequences), work) for mb in r] for r in plan.ranks]
    assert plan.makespan == pytest.approx(max(map(sum, each)))
    flat = [w for rank in each for w in rank]
    assert plan.makespan_lower_bound == pytest.approx(max(sum(flat) / len(each), max(flat)))
    assert plan.makespan_lower_bound <= plan.makespan


def test_train_plan_on_a_thousand_workloads():
    rng = np.random.default_rng(0)
    for trial in range(1000):
        ranks, b, v = int(rng.choice([1, 2, 4, 8, 16])), int(rng.choice([1, 2, 4])), int(rng.choice([1, 2]))
        batch = make_batch([heavy_tailed(rng, rng.integers(1, 9)) for _ in range(rng.integers(1, 17))])
        assignments = assign(batch, trial)
        tags = TEXT if trial % 2 else SPECIAL
        plan = train_plan(batch, assignments, tags, ranks, b, v)

        assert plan.pad_sequences == plan.pad_lower_bound == -batch.num_traces % (ranks * b * v)
        assert len(plan.ranks) == ranks
        assert len({len(rank) for rank in plan.ranks}) == 1 and len(plan.ranks[0]) % v == 0
        assert all(len(mb.sequences) == b for rank in plan.ranks for mb in rank)
        expected = {
            (q, j): (tag, len(s.prompt_ids) + len(tags.ids[tag]) + len(s.completion_ids[j]) - 1)
            for q, (s, assignment) in enumerate(zip(batch.sets, assignments))
            for j, tag in enumerate(assignment.tags)
        }
        assert len(plan.sequences) == len(expected)
        assert {(s.question, s.trace): (s.tag, s.num_tokens) for s in plan.sequences} == expected
        check_report(plan)


def test_padded_work_is_least_over_all_groupings():
    """No way to group the sequences and PADs into microbatches of b has less padded work."""

    def groupings(items, b):
        if not items:
            yield []
            return
        for rest in itertools.combinations(range(1, len(items)), b - 1):
            left = [x for k, x in enumerate(items) if k and k not in rest]
            for more in groupings(left, b):
                yield [[items[0], *(items[k] for k in rest)], *more]

    rng = np.random.default_rng(1)
    for b, num_traces in ((2, 5), (2, 8), (3, 7), (4, 6)):
        for _ in range(12):
            plan = train_plan(make_batch([heavy_tailed(rng, num_traces)]), b=b)
            total = sum(WORK.of(mb.size) for rank in plan.ranks for mb in rank)
            lengths = [s.num_tokens for s in plan.sequences] + [1] * plan.pad_sequences
            least = min(sum(b * alone(max(g)) for g in grouping) for grouping in groupings(lengths, b))
            assert total == pytest.approx(least)


def test_pads_gather_in_microbatches_of_their_own():
    plan = train_plan(make_batch([[500] * 5, [300] * 4]), ranks=2, b=4, v=2)
    pads = [sum(s.is_pad for s in mb.sequences) for rank in plan.ranks for mb in rank]
    assert sorted(pads) == [0, 0, 3, 4]


@pytest.mark.parametrize("seed", range(20))
def test_makespan_is_close_to_its_bound(seed):
    rng = np.random.default_rng([2, seed])
    lengths = heavy_tailed(rng, 128, mean=5000, sigma=0.9)
    plan = train_plan(make_batch([lengths[k : k + 4] for k in range(0, 128, 4)]), ranks=8)
    assert plan.makespan <= 1.02 * plan.makespan_lower_bound
    assert len(plan.sequences) == 128 and plan.pad_sequences == 0


def test_makespan_at_the_papers_batch():
    """8 questions x 4 traces on 8 ranks, where four sequences a rank leave little to choose."""
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(50):
        works = [alone(n) for n in heavy_tailed(rng, 32, mean=6500, sigma=0.5)]
        loads = [sum(works[k] for k in items) for items in balance(works, 8, equal_counts=True)]
        least = max(works) + sum(sorted(works)[:3])  # with equal counts the heaviest has three companions
        ratios.append(max(loads) / max(makespan_lower_bound(works, 8), least))
    assert np.mean(ratios) < 1.02


def test_large_batches_are_planned_quickly():
    rng = np.random.default_rng(4)
    batch = make_batch([heavy_tailed(rng, 4, mean=5000) for _ in range(1024)])
    assignments = assign(batch)
    for ranks in (8, 64):
        plan_it = functools.partial(train_plan, batch, assignments, ranks=ranks)
        assert calls_of(plan_it) < 30 * 4096  # 26.3 for each trace when it was written
        plan, cost = yardsticks(plan_it, limit=8)
        assert cost < 8  # 3.7 when it was written: 22 ms
        assert plan.makespan <= 1.002 * plan.makespan_lower_bound


def test_plan_is_a_function_of_its_arguments():
    rng = np.random.default_rng(5)
    batch = make_batch([heavy_tailed(rng, 5) for _ in range(9)])
    assert train_plan(batch, ranks=4, b=2) == train_plan(batch, ranks=4, b=2)
    assert cost_plan(batch, ranks=4) == cost_plan(batch, ranks=4)


def test_each_rank_runs_its_longest_microbatch_first():
    rng = np.random.default_rng(6)
    batch = make_batch([heavy_tailed(rng, 6) for _ in range(8)])
    for plan in (train_plan(batch, ranks=4, b=2), cost_plan(batch, ranks=4, budget=300)):
        for rank in plan.ranks:
            longest = [max(s.num_tokens for s in mb.sequences) for mb in rank]
            assert longest == sorted(longest, reverse=True)


def test_nothing_to_plan_is_refused():
    with pytest.raises(ValueError, match="no traces"):
        train_plan(make_batch([]))
    with pytest.raises(ValueError, match="no traces"):
        cost_plan(make_batch([]))


@pytest.mark.parametrize("v", [1, 2, 4])
def test_cost_plan_covers_every_pair_within_the_budget(v):
    rng = np.random.default_rng(7)
    for trial in range(150):
        ranks, budget = int(rng.choice([1, 2, 3, 8, 16])), int(rng.choice([1, 64, 300, 5000]))
        tags = TEXT if trial % 2 else SPECIAL
        cut = int(rng.choice([1, 4, 50, 100000]))
        questions = int(rng.integers(1, 7))
        batch = make_batch(
            [heavy_tailed(rng, rng.integers(1, 9)) for _ in range(questions)], rng.integers(1, 80, questions).tolist()
        )
        plan = cost_plan(batch, tags, cut, ranks, budget, v)

        expected = {
            (q, j, i): len(s.prompt_ids) + len(ids) + min(cut, len(completion)) - 1
            for q, s in enumerate(batch.sets)
            for j, completion in enumerate(s.completion_ids)
            for i, ids in enumerate(tags.ids)
        }
        assert len(plan.sequences) == len(expected)
        assert {(s.question, s.trace, s.tag): s.num_tokens for s in plan.sequences} == expected
        assert len(plan.ranks) == ranks
        assert all(mb.size.tokens <= budget or len(mb.sequences) == 1 for rank in plan.ranks for mb in rank)
        counts = [len(rank) for rank in plan.ranks]
        assert min(counts) >= 1
        assert plan.pad_sequences == plan.pad_lower_bound
        if v > 1:
            assert len(set(counts)) == 1 and counts[0] % v == 0
        if plan.pad_sequences:  # only where every sequence already stands alone and ranks or groups remain
            assert all(len(mb.sequences) == 1 for rank in plan.ranks for mb in rank)
            assert v > 1 or len(expected) < ranks == sum(counts)
        check_report(plan)


def test_cost_plan_uses_few_and_even_microbatches():
    rng = np.random.default_rng(8)
    for ranks in (1, 2, 8, 16):
        batch = make_batch([heavy_tailed(rng, 4, mean=600) for _ in range(32)])
        plan = cost_plan(batch, ranks=ranks, budget=8192)
        count = sum(len(rank) for rank in plan.ranks)
        lengths = sorted((s.num_tokens for s in plan.sequences), reverse=True)
        least, start = 0, 0
        while start < len(lengths):
            start += 8192 // lengths[start]
            least += 1
        assert least <= count < least + ranks
        assert plan.makespan <= 1.05 * plan.makespan_lower_bound


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_cost_plan_is_even_where_microbatches_are_few(ranks):
    """One or two microbatches a rank: against the work without any padding, which no plan reaches."""
    rng = np.random.default_rng([10, ranks])
    ratios = []
    for _ in range(10):
        batch = make_batch([heavy_tailed(rng, 4, mean=600, sigma=0.6) for _ in range(8)])
        plan = cost_plan(batch, ranks=ranks, budget=30000)
        ratios.append(plan.makespan * ranks / sum(alone(s.num_tokens) for s in plan.sequences))
    assert np.mean(ratios) < 1.15 and max(ratios) < 1.25


def test_fewer_pairs_than_ranks_leave_one_pad_a_rank():
    tags = ForkingTokens(("<a>", "<b>"), ((1,), (2,)), "special")
    plan = plan_cost_rows(make_batch([[5]]), 5, tags, RowLimits(5, max_tokens=1000), WORK)
    assert sorted(rank[0].sequences[0].is_pad for rank in plan.ranks) == [False, False, True, True, True]
    assert all(len(rank) == 1 for rank in plan.ranks) and plan.pad_sequences == 3


def partitions(num_items, num_ranks, equal):
    for placing in itertools.product(range(num_ranks), repeat=num_items):
        counts = collections.Counter(placing)
        if not equal or all(counts[r] == num_items // num_ranks for r in range(num_ranks)):
            yield placing


@pytest.mark.parametrize("equal", [True, False])
def test_balance_against_brute_force(equal):
    rng = np.random.default_rng(9)
    ratios = []
    for _ in range(25):
        num_ranks, num_items = (2, 8) if rng.random() < 0.5 else (3, 6)
        work = rng.lognormal(0, 1, num_items).tolist()
        groups = balance(work, num_ranks, equal_counts=equal)
        assert sorted(itertools.chain(*groups)) == list(range(num_items))
        assert not equal or {len(g) for g in groups} == {num_items // num_ranks}
        least = min(
            max(sum(w for w, rank in zip(work, placing) if rank == r) for r in range(num_ranks))
            for placing in partitions(num_items, num_ranks, equal)
        )
        ratios.append(max(sum(work[k] for k in g) for g in groups) / least)
        assert least >= makespan_lower_bound(work, num_ranks) - 1e-9
    assert np.mean(ratios) < 1.02 and max(ratios) < 1.15


def test_balance_keeps_counts_equal():
    rng = np.random.default_rng(11)
    for _ in range(300):
        num_ranks, each = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        groups = balance(rng.lognormal(0, 1, num_ranks * each).tolist(), num_ranks, equal_counts=True)
        assert sorted(itertools.chain(*groups)) == list(range(num_ranks * each))
        assert {len(group) for group in groups} == {each}


@pytest.mark.parametrize("equal", [True, False])
def test_balance_leaves_no_rank_empty(equal):
    for num_ranks in (1, 2, 5):
        for work in ([1e12] + [1e-9] * 9, [1.0] * 10, [5.0, 5.0] + [1e-30] * 8):
            groups = balance(work, num_ranks, equal_counts=equal)
            assert all(groups) and sum(map(len, groups)) == 10


def test_work_model_counts_the_layers():
    """One layer, counted by hand: hidden 8, 4 heads of 6, 2 key/value heads, MLP 10, vocabulary 20."""
    shape = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 6,
        "ffn_hidden_size": 10,
    }
    weights = 8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 10
    pairs = 4 * 6 * 2 * 2  # per pair of tokens: 4 heads, 6 channels, multiply and add, scores and values
    work = WorkModel.for_model(ModelConfig(**shape), 20)
    assert (work.token, work.pair, work.scored) == (2 * weights, pairs, 2 * 8 * 20)
    assert work.of(Size(100, 5050, 7)) == 100 * 2 * weights + 5050 * pairs + 7 * 2 * 8 * 20
    plain = WorkModel.for_model(ModelConfig(**shape, swiglu=False), 20)
    assert plain.token == 2 * (weights - 80)
    deep = WorkModel.for_model(ModelConfig(**(shape | {"num_layers": 1000})), 20, attention_efficiency=0.5)
    assert (deep.token, deep.pair, deep.scored) == (2000 * weights, 2000 * pairs, 2 * 8 * 20)
