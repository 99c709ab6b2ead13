"""Plans of the packed layout cover everything once, keep the budget, need no PAD too many, and are even."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_ssft.config import ModelConfig
from megatron_ssft.records import Assignment, ForkingTokens, QuestionBatch, QuestionVisit, Size, TokenizedSet
from megatron_ssft.scheduling import (
    StreamLayout,
    StreamLimits,
    WorkModel,
    distinct_traces,
    plan_cost_streams,
    plan_train_streams,
)
from megatron_ssft.scheduling.pack_streams import pack
from megatron_ssft.scheduling.pad_bound import fewest_streams
from megatron_ssft.scheduling.search_streams import fit_into
from megatron_ssft.scheduling.sequences import train_sequences
from megatron_ssft.scheduling.shared_nodes import ItemNodes, Part, question_parts, stream_nodes
from tests.helpers.paths import ROOT

WORK = WorkModel(token=1.0, pair=4e-5, scored=0.2)
LARGE = WorkModel.for_model(
    ModelConfig(
        num_layers=64,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        kv_channels=128,
        ffn_hidden_size=27648,
    ),
    152064,
)
SPECIAL = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 9)), tuple((900 + i,) for i in range(8)), "special")
TEXT = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 9)), tuple((5,) * (3 + i % 3) for i in range(8)), "text")
EFFORT = StreamLimits(1, 1).search_effort
TWO = ForkingTokens(("<a>", "<b>"), ((1,), (2, 3)), "text")


def make_batch(lengths, prompts, rng=None):
    """Completions of these lengths, one list a question; of zeros unless random."""

    def ids(length):
        return np.zeros(length, dtype=np.int32) if rng is None else rng.integers(0, 3, length, dtype=np.int32)

    sets = tuple(
        TokenizedSet(f"q{k}", "s.jsonl", k + 1, ids(p), tuple(ids(n) for n in of), (None,) * len(of))
        for k, (of, p) in enumerate(zip(lengths, prompts, strict=True))
    )
    return QuestionBatch(tuple(QuestionVisit(k, 0) for k in range(len(sets))), sets)


def heavy_tailed(rng, size, median=60.0, sigma=1.0, longest=32000):
    return np.clip(rng.lognormal(math.log(median), sigma, size), 1, longest).astype(int).tolist()


def make_step(lengths, prompts, rng, num_tags=8):
    """A batch and random tags: some traces of a question share one."""
    batch = make_batch(lengths, prompts)
    return batch, [Assignment(tuple(rng.integers(0, num_tags, s.num_traces).tolist())) for s in batch.sets]


def random_step(rng, most_questions=16, most_traces=8):
    lengths = [heavy_tailed(rng, rng.integers(1, most_traces + 1)) for _ in range(rng.integers(1, most_questions + 1))]
    return make_step(lengths, rng.integers(1, 301, len(lengths)).tolist(), rng)


def large_step(questions, seed):
    rng = np.random.default_rng([questions, seed])
    mean = rng.uniform(5000, 7500)
    return make_step(
        [heavy_tailed(rng, 4, mean / math.exp(0.32), 0.8) for _ in range(questions)], [200] * questions, rng
    )


def train_plan(step, tags=SPECIAL, ranks=1, budget=32768, v=1, equal=False, work=WORK, **options):
    limits = StreamLimits(ranks, budget, v, equal_counts=equal, layout=StreamLayout(**options))
    return plan_train_streams(*step, tags, limits, work)


def cost_plan(batch, tags=SPECIAL, cut=1000, ranks=1, budget=4096, v=1, least=1, work=WORK, **options):
    limits = StreamLimits(ranks, budget, v, min_microbatches=least, layout=StreamLayout(**options))
    return plan_cost_streams(batch, cut, tags, limits, work)


def tree_size(batch, tags, sequences, share=True):
    """Size of a stream from the prefix tree of its sequences: a node is a run of tokens between two depths."""
    nodes = {}
    scored = 0
    for k, s in enumerate(sequences):
        scored += s.num_scored
        if s.is_pad:
            nodes["pad", k] = (0, 1)
            continue
        prompt = len(batch.sets[s.question].prompt_ids)
        tagged = prompt + len(tags.ids[s.tag])
        own = () if share else (k,)
        nodes[(s.question, *own)] = (0, prompt)
        nodes[(s.question, "tag", s.tag, *own)] = (prompt, tagged)
        nodes[("trace", k)] = (tagged, s.num_tokens)
    tokens = sum(end - start for start, end in nodes.values())
    return Size(tokens, sum(sum(range(start + 1, end + 1)) for start, end in nodes.values()), scored)


def token_tree_size(batch, tags, sequences):
    """The same from the tree of single tokens, for prompts and tags of known identity."""
    tree = set()
    for k, s in enumerate(sequences):
        prompt, tag = len(batch.sets[s.question].prompt_ids), len(tags.ids[s.tag])
        owners = [(s.question,)] * prompt + [(s.question, s.tag)] * tag + [(k, "trace")] * s.num_tokens
        tree |= {(depth, owner) for depth, owner in enumerate(owners[: s.num_tokens])}
    return len(tree), sum(depth + 1 for depth, _ in tree)


def check(plan, batch, tags, *, ranks, budget, v, equal, one, share, work=WORK):
    """What holds for every plan of streams; returns the PADs."""
    streams = [mb for rank in plan.ranks for mb in rank]
    assert plan.layout == ("packed" if share else "unshared")
    assert len(plan.ranks) == ranks and all(plan.ranks)
    assert all(mb.sequences for mb in streams)
    for mb in streams:
        assert mb.size == tree_size(batch, tags, mb.sequences, share)
        assert mb.size.tokens <= budget or len(mb.sequences) == 1
        assert len(mb.sequences) == 1 or not any(s.is_pad for s in mb.sequences)
        assert not one or len({s.question for s in mb.sequences}) == 1
    counts = [len(rank) for rank in plan.ranks]
    assert not equal or (len(set(counts)) == 1 and counts[0] % v == 0)
    each = [[work.of(mb.size) for mb in rank] for rank in plan.ranks]
    assert all(works == sorted(works, reverse=True) for works in each)
    assert plan.makespan == pytest.approx(max(map(sum, each)))
    everything = [s for mb in streams for s in mb.sequences if not s.is_pad]
    alone = max(work.of(tree_size(batch, tags, [s])) for s in everything)
    total = work.of(tree_size(batch, tags, everything, share))
    assert plan.makespan_lower_bound == pytest.approx(min(plan.makespan, max(total / ranks, alone)))
    pads = sum(s.is_pad for mb in streams for s in mb.sequences)
    assert plan.pad_sequences == pads
    return pads


# -- training --------------------------------------------------------------------------------------------------------


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
        seconds = []
        for _ in range(5):
            start = time.process_time()
            plan = train_plan(step, ranks=ranks, budget=budget, equal=equal, work=LARGE)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.05
        assert budget < 32768 or plan.makespan <= 1.01 * plan.makespan_lower_bound


def feasible(batch, tags, streams, budget, one):
    return all(
        len(stream) == 1
        or (tree_size(batch, tags, stream).tokens <= budget and (not one or len({s.question for s in stream}) == 1))
        for stream in streams
    )


def set_partitions(items):
    if not items:
        yield []
        return
    for rest in set_partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]


def small_step(rng, most=7):
    while True:
        lengths = [rng.integers(1, 60, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 5))]
        if sum(map(len, lengths)) <= most:
            return make_step(lengths, rng.integers(1, 40, len(lengths)).tolist(), rng, num_tags=3)


def test_no_way_to_pack_needs_fewer_pads():
    """Against every partition into streams: n of them need (-n) mod (R v) PADs."""
    rng = np.random.default_rng(2)
    seen = collections.Counter()
    for _ in range(150):
        step = small_step(rng)
        ranks, v = int(rng.choice([1, 2, 3, 4])), int(rng.choice([1, 2]))
        budget, one = int(rng.integers(40, 160)), bool(rng.integers(2))
        sequences = train_sequences(*step, TEXT)
        least = min(
            -len(streams) % (ranks * v)
            for streams in set_partitions(sequences)
            if feasible(step[0], TEXT, streams, budget, one)
        )
        plan = train_plan(step, TEXT, ranks, budget, v, True, one_question=one)
        assert plan.pad_sequences == plan.pad_lower_bound == least
        seen[least > 0, len(sequences) > ranks * v] += 1
    assert len(seen) == 4 and min(seen.values()) >= 5, seen


@pytest.mark.parametrize(
    ("ranks", "lengths", "prompts", "tags", "budget"),
    [
        (5, [[30], [3, 33], [7, 5, 51], [24, 15], [14]], [10, 19, 14, 8, 30], [0, 0, 0, 1, 2, 0, 0, 1, 0], 68),
        (5, [[21], [7, 14], [24, 29], [59, 58, 43]], [29, 30, 14, 28], [0, 0, 2, 1, 1, 1, 0, 1], 102),
        (4, [[7, 11], [6, 58, 23], [44], [22]], [20, 13, 21, 11], [1, 2, 2, 1, 0, 1, 0], 74),
    ],
)
def test_pads_that_only_a_search_avoids(ranks, lengths, prompts, tags, budget):
    """As many streams as ranks suffice, but best fit decreasing takes one more."""
    remaining = iter(tags)
    assignments = [Assignment(tuple(next(remaining) for _ in of)) for of in lengths]
    plan = train_plan((make_batch(lengths, prompts), assignments), TEXT, ranks, budget, equal=True)
    assert [len(rank) for rank in plan.ranks] == [1] * ranks
    assert plan.pad_sequences == plan.pad_lower_bound == 0


def test_pads_where_every_trace_needs_a_stream():
    """Too many for a search, which is not needed."""
    step = make_step([[600, 601]] * 200 + [[610]] * 3, [10] * 203, np.random.default_rng(14))
    plan = train_plan(step, ranks=8, budget=1000, v=2, equal=True)
    assert {len(rank) for rank in plan.ranks} == {52}
    assert plan.pad_sequences == plan.pad_lower_bound == -403 % 16


def test_parts_know_their_size():
    rng = np.random.default_rng(15)
    batch, assignments = step = make_step([heavy_tailed(rng, 8)], [37], rng, num_tags=3)
    sequences = train_sequences(*step, TEXT)
    nodes = stream_nodes(batch, sequences, TEXT, WORK, True)
    items = ItemNodes.of(nodes)

    def check_size(part):
        size = tree_size(batch, TEXT, [sequences[k] for k in part.items])
        assert part.tokens == size.tokens
        assert part.work * nodes.flops_per_unit == pytest.approx(WORK.of(size)) and part.work == items.work(part.items)

    part, out = Part(items, 0), set(range(1, 8))
    for _ in range(200):
        if out and (len(part.items) == 1 or rng.random() < 0.5):
            item = int(rng.choice(sorted(out)))
            tokens = part.tokens + part.added_tokens(item)
            assert part.joined_tokens(Part(items, item)) == tokens
            part.add(item)
            out.remove(item)
            assert part.tokens == tokens
        else:
            item = int(rng.choice(part.items))
            work = part.work - part.own_gain(item)
            part.remove(item)
            out.add(item)
            assert part.work == work
        check_size(part)


def test_a_stream_is_filled_to_the_last_token():
    """Also by parts of one question, whose prompt and tags count once."""
    rng = np.random.default_rng(16)
    for _ in range(30):
        batch, assignments = step = small_step(rng)
        sequences = train_sequences(*step, TEXT)
        nodes = stream_nodes(batch, sequences, TEXT, WORK, True)
        tokens = tree_size(batch, TEXT, sequences).tokens
        alone = question_parts(ItemNodes.of(nodes), 1, 0)
        assert len(alone) == len(sequences)
        together = question_parts(ItemNodes.of(nodes), tokens, 1 << 62)
        assert len(together) == len(batch.sets)
        assert len(pack(together, tokens, False)) == 1 == fewest_streams(nodes, tokens, False)
        assert len(pack([p for p in alone if p.question == 0], tokens, False)) == 1
        one = tree_size(batch, TEXT, [s for s in sequences if s.question == 0]).tokens
        assert len(pack([p for p in alone if p.question == 0], one, True)) == 1


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


def test_search_and_bound_against_every_partition():
    rng = np.random.default_rng(4)
    for _ in range(250):
        batch, assignments = step = small_step(rng)
        budget, one, share = int(rng.integers(40, 200)), bool(rng.integers(2)), bool(rng.integers(2))
        sequences = train_sequences(*step, TEXT)
        nodes = stream_nodes(batch, sequences, TEXT, WORK, share)

        def fits(stream, batch=batch, budget=budget, one=one, share=share):
            alike = not one or len({s.question for s in stream}) == 1
            return len(stream) == 1 or (tree_size(batch, TEXT, stream, share).tokens <= budget and alike)

        least = min(len(streams) for streams in set_partitions(sequences) if all(map(fits, streams)))
        assert fewest_streams(nodes, budget, one) <= least
        found, certain = fit_into(ItemNodes.of(nodes), least, budget, one, EFFORT)
        assert certain and len(found) <= least
        assert sorted(itertools.chain(*found)) == list(range(len(sequences)))
        assert all(fits([sequences[k] for k in stream]) for stream in found)
        assert fit_into(ItemNodes.of(nodes), least - 1, budget, one, EFFORT) == (None, True)


@pytest.mark.parametrize(
    ("count", "lengths", "prompts", "tags", "budget"),
    [
        (3, [[10, 3, 7], [3, 4, 3], [10], [3, 7]], [6, 2, 2, 5], [1, 0, 1, 0, 1, 1, 0, 0, 0], 23),
        (2, [[10, 3], [3, 4, 6], [10, 4]], [1, 2, 1], [1, 1, 0, 1, 1, 1, 1], 22),
    ],
)
def test_search_tells_streams_of_one_size_apart_by_what_they_share(count, lengths, prompts, tags, budget):
    remaining = iter(tags)
    step = make_batch(lengths, prompts), [Assignment(tuple(next(remaining) for _ in of)) for of in lengths]
    sequences = train_sequences(*step, SPECIAL)
    nodes = ItemNodes.of(stream_nodes(step[0], sequences, SPECIAL, WORK, True))
    found, certain = fit_into(nodes, count, budget, False, EFFORT)
    assert certain and len(found) == count
    assert all(tree_size(step[0], SPECIAL, [sequences[k] for k in of]).tokens <= budget for of in found)


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


# -- cost pass -------------------------------------------------------------------------------------------------------


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
        seconds = []
        for _ in range(5):
            start = time.process_time()
            plan = cost_plan(batch, SPECIAL, 512, ranks, budget, v, 4)
            seconds.append(time.process_time() - start)
        assert len(plan.sequences) == 8000 and min(seconds) < 0.05


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


# -- the benchmark ---------------------------------------------------------------------------------------------------


def run_benchmark(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "scheduling.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_benchmark_prints_a_table_and_writes_its_figures(tmp_path):
    done = run_benchmark("--repeats", 2, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["workloads"]) == 4
    for workload in figures["workloads"]:
        of = workload["schedulers"]
        for name, values in of.items():
            assert {"pad_over_bound", "makespan_over_bound", "planning_ms"} <= values.keys()
            assert name in done.stdout and values["makespan_over_bound"] >= 1 and values["pad_over_bound"] >= 1
        assert of["token_budget"]["pad_over_bound"] == of["padded"]["pad_over_bound"] == 1
        assert of["token_budget"]["makespan_over_bound"] < of["per_question"]["makespan_over_bound"]


@pytest.mark.parametrize(
    "arguments", [("--repeats", 0), ("--sigma", "x"), ("--seed", -1), ("--json", "/no/such/folder/x.json")]
)
def test_benchmark_refuses_bad_arguments_in_a_line(arguments):
    done = run_benchmark(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"scheduling.py: error: argument {arguments[0]}:")
