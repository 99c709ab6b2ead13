"""The approximations of the matching: what they lose is measured right, and they answer only where they may."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_ssft.matching.approximation import (
    assignment_regret,
    is_certain,
    known_cost,
    second_best_margin,
)
from megatron_ssft.matching.assignment import solve_assignment

SHAPES = [(n, m) for n in range(1, 6) for m in range(1, n + 1)]


def injections(num_tags, num_traces):
    return np.array(list(itertools.permutations(range(num_tags), num_traces)))


def totals(cost):
    """Of every injection, in extended precision, above the sum of the column minima."""
    cost = np.asarray(cost, dtype=np.longdouble)
    return (cost - cost.min(axis=0))[injections(*cost.shape), np.arange(cost.shape[1])].sum(axis=-1)


def drawn_costs(num_tags, num_traces):
    """Costs of every kind: plain, tied, with equal columns, nearly tied, masked, far from 0, tiny."""
    rng = np.random.default_rng([num_tags, num_traces])
    shape = (num_tags, num_traces)
    for _ in range(8):
        nll = rng.gamma(2.0, 1.0, shape)
        yield nll
        yield rng.integers(0, 3, shape).astype(float)
        yield nll[:, rng.integers(0, num_traces, num_traces)]
        yield nll[rng.integers(0, num_tags, num_tags)]
        yield 1e-9 * nll + rng.normal(0, 5, num_traces)
        yield nll + 1e9 * rng.integers(0, 2, shape)
        yield nll + 1e7
        yield 1e-30 * nll
        yield np.asfortranarray(nll.astype(np.float32))
        yield np.full(shape, 2.5)


# -- regret and margin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tags, num_traces", SHAPES)
def test_regret_is_the_distance_to_the_best_of_all_injections(num_tags, num_traces):
    rng = np.random.default_rng(0)
    for cost in drawn_costs(num_tags, num_traces):
        every, each = injections(num_tags, num_traces), totals(cost)
        scale = float(np.abs(cost).max())
        for k in rng.integers(0, len(every), 4):
            regret = assignment_regret(cost, tuple(every[k].tolist()))
            assert regret >= 0.0 and regret == pytest.approx(float(each[k] - each.min()), abs=1e-14 * scale)
        assert assignment_regret(cost, solve_assignment(cost, seed=3)) <= 1e-15 * scale


@pytest.mark.parametrize("num_tags, num_traces", SHAPES)
def test_margin_is_the_second_least_of_all_injections(num_tags, num_traces):
    for cost in drawn_costs(num_tags, num_traces):
        margin = second_best_margin(cost)
        if num_tags == 1:
            assert margin == math.inf
            continue
        least, second = np.sort(totals(cost))[:2]
        assert margin >= 0.0 and margin == pytest.approx(float(second - least), abs=1e-14 * float(np.abs(cost).max()))


def test_ties_have_no_margin():
    assert second_best_margin(np.ones((6, 4))) == 0.0
    cost = np.array([[0.0, 9.0], [9.0, 1.0], [9.0, 1.0]])  # tags 1 and 2 serve trace 1 alike
    assert second_best_margin(cost) == 0.0
    cost[2, 1] = 1.25
    assert second_best_margin(cost) == 0.25
    same = np.random.default_rng(0).random((5, 1))
    assert second_best_margin(np.hstack([same, same])) == 0.0  # equal traces can change places


def test_margin_ignores_what_a_trace_has_in_common():
    rng = np.random.default_rng(1)
    cost = rng.integers(0, 100, (5, 4)) / 64
    assert second_best_margin(cost + np.array([1e6, -1e6, 3.0, 0.0])) == second_best_margin(cost)


def test_margin_at_a_size_beyond_enumeration():
    """A dominant diagonal: the cheapest change is the cheapest swap of two traces or move to a free tag."""
    rng = np.random.default_rng(2)
    step = rng.integers(1, 1000, (48, 40)) / 1024
    cost = 1.0 + step
    cost[range(40), range(40)] = 0.0
    swaps = min(cost[i, j] + cost[j, i] for i in range(40) for j in range(i))
    assert second_best_margin(cost) == min(swaps, cost[40:].min())


@pytest.mark.parametrize("tags", [(0, 0), (0,), (0, 1, 2), (0, 3), (-1, 0)])
def test_regret_of_what_is_no_assignment(tags):
    with pytest.raises(ValueError, match="tags"):
        assignment_regret(np.ones((3, 2)), tags)


@pytest.mark.parametrize("function", [second_best_margin, lambda cost: assignment_regret(cost, (0, 1))])
def test_costs_that_are_not_finite_or_misshapen_are_refused(function):
    with pytest.raises(ValueError, match="finite"):
        function(np.array([[1.0, 2.0], [np.nan, 1.0]]))
    with pytest.raises(ValueError, match="shape"):
        function(np.ones((1, 2)))


# -- adaptive T_r ------------------------------------------------------------------------------------------------


def token_nll(rng, num_tags, lengths, spread):
    """Per-token NLL of each pair: [M] arrays [N, L_j]."""
    return [rng.gamma(2.0, spread, (num_tags, 1)) + rng.gamma(1.0, 0.1, (num_tags, n)) for n in lengths]


def mean_nll(nll, tokens):
    return np.stack([column[:, :tokens].mean(axis=1) for column in nll], axis=1)


def test_known_cost_is_the_first_tokens_share_of_the_exact_mean():
    rng = np.random.default_rng(0)
    lengths = [1, 5, 8, 9, 20, 64, 65, 300]
    nll = token_nll(rng, 9, lengths, 1.0)
    known = known_cost(mean_nll(nll, 8), lengths, 8, 64)
    for j, n in enumerate(lengths):
        assert np.allclose(known[:, j], nll[j][:, :8].sum(axis=1) / min(n, 64), rtol=1e-14)
    assert known.dtype == np.float64
    assert np.array_equal(known_cost(mean_nll(nll, 64), lengths, 64, 64), mean_nll(nll, 64))


def rests(rng, known, bounds):
    """Rests of the exact costs within the model: random ones and the worst for the assignment of `known`."""
    shape = known.shape
    level = rng.normal(0, 3, shape[1])  # what a trace's rest has in common is free
    tags = solve_assignment(known, seed=0)
    yield level + bounds * rng.random(shape)
    yield level + bounds * rng.integers(0, 2, shape)
    against = np.zeros(shape)
    against[list(tags), range(shape[1])] = bounds
    yield level + against
    yield against


@pytest.mark.parametrize("num_tags, num_traces", SHAPES)
def test_certain_means_no_rest_within_the_bound_can_change_the_matching(num_tags, num_traces):
    rng = np.random.default_rng([1, num_tags, num_traces])
    answers = []
    for k in range(60):
        lengths = rng.integers(1, 60, num_traces)
        first_tokens, matching_tokens = 16, int(rng.integers(16, 80))
        first = rng.gamma(2.0, 10.0 ** rng.uniform(-2, 1), (num_tags, num_traces))
        certainty = 10.0 ** rng.uniform(-2, 0.5)
        known = known_cost(first, lengths, first_tokens, matching_tokens)
        exact_tokens = np.minimum(lengths, matching_tokens)
        bounds = certainty * (exact_tokens - np.minimum(lengths, first_tokens)) / exact_tokens
        certain = is_certain(first, lengths, first_tokens, matching_tokens, certainty)
        chosen = solve_assignment(known, seed=k)
        regrets = [assignment_regret(known + rest, chosen) for rest in rests(rng, known, bounds)]
        if certain:
            assert max(regrets) < 1e-12, (known, bounds, chosen)
        else:  # and it is not too careful: some rest within the bound does change the matching
            assert max(regrets) > 0.0, (known, bounds, chosen)
        answers.append(certain)
    if num_tags > 1:
        assert 5 < sum(answers) < 60, answers


def test_large_gaps_are_certain_and_small_ones_are_not():
    rng = np.random.default_rng(3)
    lengths = [40, 100, 700, 1000]
    separated, alike = 0, 0
    for _ in range(50):
        first = 1.0 + 0.05 * rng.random((6, 4))
        alike += is_certain(first, lengths, 64, 512, 0.2)
        first[rng.permutation(6)[:4], range(4)] -= 0.9
        separated += is_certain(first * 4, lengths, 64, 512, 0.2)
    assert (separated, alike) == (50, 0)
    assert not is_certain(np.ones((6, 4)), lengths, 64, 512, 1e-9)  # at the start of training all tags are alike


def test_more_certainty_asked_for_means_fewer_certain_questions():
    rng = np.random.default_rng(4)
    for _ in range(30):
        first = rng.gamma(2.0, 1.0, (4, 3))
        lengths = rng.integers(1, 200, 3)
        answers = [is_certain(first, lengths, 16, 128, c) for c in (1e-6, 1e-3, 1e-2, 0.1, 0.5, 1.0, 100.0)]
        assert answers == sorted(answers, reverse=True)


def test_traces_that_are_wholly_known_are_certain_whatever_they_cost():
    rng = np.random.default_rng(5)
    for cost in (np.ones((6, 4)), rng.random((6, 4)), rng.integers(0, 2, (6, 4))):
        assert is_certain(cost, [1, 3, 64, 64], 64, 512, 1e9)
        assert is_certain(cost, [1, 3, 640, 6400], 64, 64, 1e9)  # T_0 = T_r
    assert is_certain(np.ones((1, 1)), [1000], 64, 512, 1e9)  # there is no other assignment


def test_equal_short_traces_do_no_harm_and_equal_long_ones_stay_open():
    first = np.full((4, 3), 9.0)
    first[0, 0] = first[1, 1] = first[1, 2] = 0.0  # traces 1 and 2 alike, trace 0 long and settled
    assert is_certain(first, [500, 10, 10], 64, 512, 0.1)
    assert not is_certain(first, [10, 500, 500], 64, 512, 0.1)


def test_long_traces_do_not_outweigh_short_ones():
    """By the plain means of the first part trace 1 would win tag 0; nine tenths of its exact mean are yet unknown."""
    first = np.array([[0.0, 0.0], [1.0, 1.5]])
    lengths = [10, 100]
    assert solve_assignment(first, seed=0) == (1, 0)
    assert solve_assignment(known_cost(first, lengths, 10, 100), seed=0) == (0, 1)
    assert is_certain(first, lengths, 10, 100, 0.9) and not is_certain(first, lengths, 10, 100, 1.0)


def test_costs_that_are_not_finite_are_left_to_the_full_scoring():
    first = np.ones((3, 2))
    first[1, 1] = np.nan
    assert not is_certain(first, [5, 100], 16, 64, 0.1)
    assert is_certain(first, [5, 10], 16, 64, 0.1)  # there is nothing more to score


@pytest.mark.parametrize(
    "lengths, first_tokens, matching_tokens, certainty",
    [
        ([5, 0], 16, 64, 0.1),
        ([5], 16, 64, 0.1),
        ([5, 5], 0, 64, 0.1),
        ([5, 5], 65, 64, 0.1),
        ([5, 5], 16, 64, 0.0),
        ([5, 5], 16, 64, -1.0),
        ([5, 5], 16, 64, math.nan),
        ([5, 5], 16, 64, math.inf),
    ],
)
def test_certainty_refuses_what_makes_no_sense(lengths, first_tokens, matching_tokens, certainty):
    with pytest.raises(ValueError):
        is_certain(np.ones((3, 2)), lengths, first_tokens, matching_tokens, certainty)
