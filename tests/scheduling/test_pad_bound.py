"""The PAD lower bound against brute force: no way to fill the ranks has fewer PADs, and one has as many."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ssft.scheduling.pad_bound import fewest_row_microbatches, pad_lower_bound


def set_partitions(items):
    if not items:
        yield []
        return
    for rest in set_partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]


def fewest_pads(lengths, num_ranks, group_size, equal_counts, fits, most=13):
    """The fewest PADs (of length 1) with which some partition fits and gives the ranks the right counts."""
    for pads in range(most):
        for microbatches in set_partitions([*lengths, *[1] * pads]):
            count = len(microbatches)
            right = count % (num_ranks * group_size) == 0 if equal_counts else count >= num_ranks
            if right and all(map(fits, microbatches)):
                return pads
    raise AssertionError("no plan found")


@pytest.mark.parametrize(("num_ranks", "group_size"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("equal_counts", [True, False])
def test_no_plan_within_a_token_budget_has_fewer_pads(num_ranks, group_size, equal_counts):
    rng = np.random.default_rng([num_ranks, group_size])
    positive = 0
    for _ in range(12):
        lengths = sorted(rng.integers(2, 12, rng.integers(1, 5)).tolist(), reverse=True)
        budget = int(rng.integers(2, 25))

        def fits(microbatch, budget=budget):
            return len(microbatch) == 1 or len(microbatch) * max(microbatch) <= budget

        bound = pad_lower_bound(
            len(lengths),
            fewest_row_microbatches(lengths, budget),
            num_ranks,
            equal_counts=equal_counts,
            group_size=group_size,
        )
        assert bound == fewest_pads(lengths, num_ranks, group_size, equal_counts, fits)
        positive += bound > 0
    assert positive or num_ranks * group_size == 1 or not equal_counts


@pytest.mark.parametrize(("num_ranks", "group_size", "rows"), [(1, 1, 3), (2, 1, 2), (3, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_no_plan_of_full_rows_has_fewer_pads(num_ranks, group_size, rows):
    for count in range(1, 5):
        bound = pad_lower_bound(
            count, -(-count // rows), num_ranks, equal_counts=True, group_size=group_size, sequences_each=rows
        )
        assert bound == -count % (num_ranks * group_size * rows)
        assert bound == fewest_pads([2] * count, num_ranks, group_size, True, lambda m, rows=rows: len(m) == rows, 7)


def test_any_lower_bound_of_the_microbatches_keeps_the_proof():
    for count, num_ranks, group_size in itertools.product(range(1, 9), (1, 2, 3), (1, 2)):
        bounds = [
            pad_lower_bound(count, fewest, num_ranks, equal_counts=True, group_size=group_size)
            for fewest in range(1, count + 1)
        ]
        assert bounds == sorted(bounds) and bounds[-1] == -count % (num_ranks * group_size)


def test_fewest_row_microbatches_against_every_grouping():
    rng = np.random.default_rng(1)
    for _ in range(60):
        lengths = sorted(rng.integers(1, 12, rng.integers(1, 7)).tolist(), reverse=True)
        budget = int(rng.integers(1, 40))
        least = min(
            len(groups)
            for groups in set_partitions(lengths)
            if all(len(g) == 1 or len(g) * max(g) <= budget for g in groups)
        )
        assert fewest_row_microbatches(lengths, budget) == least
