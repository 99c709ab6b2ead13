"""Packing token streams: no PAD too many, sizes right, the exact search against every partition."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from megatron_ssft.records import Assignment
from megatron_ssft.scheduling import StreamLimits, plan_train_streams
from megatron_ssft.scheduling.pack_streams import pack
from megatron_ssft.scheduling.pad_bound import fewest_streams
from megatron_ssft.scheduling.search_streams import fit_into
from megatron_ssft.scheduling.sequences import train_sequences
from megatron_ssft.scheduling.shared_nodes import ItemNodes, Part, question_parts, stream_nodes
from tests.helpers.token_streams import (
    EFFORT,
    SPECIAL,
    TEXT,
    WORK,
    feasible,
    heavy_tailed,
    make_batch,
    make_step,
    set_partitions,
    small_step,
    train_plan,
    tree_size,
)


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


def test_without_the_search_the_bound_stays_true_but_is_not_met():
    """The first example of `test_pads_that_only_a_search_avoids` with no effort for the search."""
    lengths, prompts = [[30], [3, 33], [7, 5, 51], [24, 15], [14]], [10, 19, 14, 8, 30]
    tags = iter([0, 0, 0, 1, 2, 0, 0, 1, 0])
    assignments = [Assignment(tuple(next(tags) for _ in of)) for of in lengths]
    limits = StreamLimits(5, 68, equal_counts=True, search_effort=0)
    plan = plan_train_streams(make_batch(lengths, prompts), assignments, TEXT, limits, WORK)
    assert plan.pad_sequences == 1 and plan.pad_lower_bound == 0
