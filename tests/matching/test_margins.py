"""Matching gaps and second-best margins against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_ssft.matching.approximation import second_best_margin
from megatron_ssft.matching.assignment import assignment_gap, solve_assignment
from megatron_ssft.matching.margins import matching_gaps, relative_margins
from megatron_ssft.records import Assignment


def brute_force(cost):
    """Mean minus least and second-least minus least over all injections of M traces into N tags."""
    n, m = cost.shape
    totals = sorted(math.fsum(cost[i, j] for j, i in enumerate(tags)) for tags in itertools.permutations(range(n), m))
    return np.mean(totals) - totals[0], totals[1] - totals[0] if len(totals) > 1 else math.inf


def assigned(cost):
    return Assignment(solve_assignment(cost, seed=0), cost)


def random_costs(rng, num_tags, questions=12):
    return [rng.normal(size=(num_tags, rng.integers(1, num_tags + 1))) for _ in range(questions)]


@pytest.mark.parametrize("num_tags", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", ["real", "ties", "far from 0", "tiny", "copies"])
def test_gaps_and_margins_by_brute_force(num_tags, kind):
    rng = np.random.default_rng(num_tags)
    costs = random_costs(rng, num_tags)
    if kind == "ties":
        costs = [np.round(c) for c in costs]
    if kind == "far from 0":
        costs = [c + 1000 * rng.random(c.shape[1]) for c in costs]
    if kind == "tiny":
        costs = [1e-9 * c for c in costs]
    if kind == "copies":  # all assignments of as many traces as tags cost the same, but for rounding
        costs = [np.repeat(rng.random((num_tags, 1)), num_tags, axis=1) for _ in range(30)]
    expected = np.array([brute_force(c) for c in costs]).T
    scale = max(np.abs(c).max() for c in costs)
    for found, right in zip(matching_gaps([assigned(c) for c in costs]), expected):
        assert found.dtype == np.float64 and (found >= 0).all()
        np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-11 * scale)
    for cost, gap, margin in zip(costs, *matching_gaps([assigned(c) for c in costs])):
        assert gap == pytest.approx(assignment_gap(cost), rel=1e-9, abs=1e-11 * scale)
        assert margin == pytest.approx(second_best_margin(cost), rel=1e-9, abs=1e-11 * scale)


def test_tags_that_are_not_optimal_are_measured_all_the_same():
    rng = np.random.default_rng(0)
    costs = random_costs(rng, 5, questions=40)
    given = [Assignment(tuple(rng.permutation(5)[: c.shape[1]].tolist()), c) for c in costs]
    for found, right in zip(matching_gaps(given), matching_gaps([assigned(c) for c in costs])):
        np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-12)


def test_the_order_of_traces_does_not_change_the_gaps():
    rng = np.random.default_rng(1)
    costs = random_costs(rng, 5)
    orders = [rng.permutation(c.shape[1]) for c in costs]
    one = matching_gaps([assigned(c) for c in costs])
    other = matching_gaps([assigned(c[:, o]) for c, o in zip(costs, orders)])
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("num_tags", "num_traces"), [(6, 4), (6, 6), (6, 1), (16, 4), (16, 12), (64, 4)])
def test_margins_are_about_what_the_gap_lets_expect(num_tags, num_traces):
    rng = np.random.default_rng(0)
    costs = [rng.random((num_tags, num_traces)) for _ in range(100)]
    gaps, margins = matching_gaps([assigned(c) for c in costs])
    relative = relative_margins(gaps, margins, np.full(100, num_traces), num_tags)
    assert 0.2 < np.median(relative) < 30
