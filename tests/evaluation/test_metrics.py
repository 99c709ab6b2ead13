"""Metrics: against enumeration of every draw, exact fractions and values worked out by hand."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from megatron_ssft.evaluation.metrics import (
    agreement,
    best_tag_accuracy,
    best_tag_by_other_samples,
    estimate,
    group_figures,
    histogram_edges,
    lengths,
    over_groups,
    pass_at_k,
    question_halves,
    stratified_pass_at_k,
)

NAN = math.nan


def share(outcomes):
    """Share of truth, exactly."""
    outcomes = list(outcomes)
    return Fraction(sum(map(bool, outcomes)), len(outcomes))


# pass@k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(float(share(map(any, itertools.combinations(samples, k)))))


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(66, 60, 7) == 1.0
    assert pass_at_k(10**5, 1, 1) == pytest.approx(1e-5)
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1), (0, 0, 1), (3, 1, -1)])
def test_pass_at_k_refuses_what_cannot_be_drawn(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)
    with pytest.raises(ValueError):
        stratified_pass_at_k([n, n], [c, c], 2 * k)


def draws(samples_by_tag, k):
    """Every way to draw k samples spread over the tags as evenly as possible, each equally likely: first the tags that
    give one more, then the samples of each tag."""
    base, extra = divmod(k, len(samples_by_tag))
    for more in itertools.combinations(range(len(samples_by_tag)), extra):
        ways = [list(itertools.combinations(s, base + (i in more))) for i, s in enumerate(samples_by_tag)]
        picks = [[any(pick) for pick in way] for way in ways]
        yield Fraction(sum(any(choice) for choice in itertools.product(*picks)), math.prod(map(len, picks)))


@pytest.mark.parametrize(
    ("n", "c"),
    [([3], [1]), ([2, 2], [1, 0]), ([2, 3, 2], [0, 1, 2]), ([2, 2, 2], [0, 0, 1]), ([3, 2, 2, 2], [1, 0, 0, 0])],
)
def test_stratified_pass_at_k_is_the_mean_over_every_draw(n, c):
    samples = [[True] * c_i + [False] * (n_i - c_i) for n_i, c_i in zip(n, c)]
    for k in range(1, len(n) * min(n) + 1):
        ways = list(draws(samples, k))
        assert stratified_pass_at_k(n, c, k) == pytest.approx(float(sum(ways) / len(ways)), abs=1e-12)


def test_stratified_pass_at_k_by_hand():
    assert stratified_pass_at_k([2, 2], [1, 0], 2) == 0.5
    assert stratified_pass_at_k([1] * 6, [0, 0, 0, 1, 0, 0], 6) == 1.0  # the tag that can is always asked
    assert pass_at_k(12, 2, 6) < stratified_pass_at_k([2] * 6, [2, 0, 0, 0, 0, 0], 6) == 1.0
    assert stratified_pass_at_k([2, 2], [0, 0], 3) == 0.0
    with pytest.raises(ValueError):
        stratified_pass_at_k([2, 1], [0, 0], 3)
    with pytest.raises(ValueError):
        stratified_pass_at_k([], [], 1)


def test_stratified_pass_at_one_sample_is_the_mean_of_the_tags():
    assert stratified_pass_at_k([4, 2], [1, 2], 1) == pytest.approx((1 / 4 + 2 / 2) / 2)


# estimates


def test_estimate_by_hand():
    assert estimate([]) is None and estimate([NAN]) is None
    one = estimate([0.5, NAN])
    assert (one.value, one.questions) == (0.5, 1) and math.isnan(one.stderr)
    two = estimate([1.0, 0.0, 1.0, NAN, 0.0])
    assert (two.value, two.questions) == (0.5, 4)
    assert two.stderr == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))


def test_standard_error_is_over_questions_and_not_over_samples():
    """Doubling the samples of every question, all agreeing, leaves it alone."""
    counts = [(4, 1), (4, 4), (4, 0)]
    once = estimate([pass_at_k(n, c, 1) for n, c in counts])
    assert once == estimate([pass_at_k(2 * n, 2 * c, 1) for n, c in counts])


def test_lengths_and_histogram_edges():
    assert lengths([]) is None
    assert (lengths([1, 2, 9]).mean, lengths([1, 2, 9]).median, lengths([1, 2, 9]).samples) == (4, 2, 3)
    for longest in (0, 1, 19, 20, 21, 64, 32768):
        edges = histogram_edges(longest)
        assert (
            len(edges) == 21
            and edges[0] == 0
            and edges[-1] > longest
            and len({b - a for a, b in itertools.pairwise(edges)}) == 1
        )


# the best tag


def test_best_tag_is_chosen_by_one_and_measured_by_the_other():
    assert best_tag_accuracy(np.array([0.1, 0.9, 0.9]), np.array([1.0, 0.2, 0.4])) == pytest.approx(0.3)
    assert best_tag_accuracy(np.array([NAN, 0.0]), np.array([1.0, 0.2])) == 0.2
    assert math.isnan(best_tag_accuracy(np.array([NAN, NAN]), np.array([1.0, 1.0])))
    assert math.isnan(best_tag_accuracy(np.array([0.0, 1.0]), np.array([1.0, NAN])))


def test_best_tag_by_other_samples_by_hand():
    assert best_tag_by_other_samples([[True, True], [False, False]]) == 1
    assert best_tag_by_other_samples([[True, False], [False, True]]) == 0  # each half points at the wrong tag
    assert math.isnan(best_tag_by_other_samples([[True, True], [True]]))


def test_held_out_choice_is_honest_where_tags_do_not_differ():
    rng = np.random.default_rng(0)
    accuracy = (rng.random((600, 6)) < 0.5).astype(float)
    ids = [f"q{i}" for i in range(600)]
    figures = group_figures(accuracy, ids, [f"g{i % 60}" for i in range(600)])
    assert over_groups([f.best_same for f in figures], figures) > 0.65  # its own luck
    assert over_groups([f.best_held_out for f in figures], figures) == pytest.approx(0.5, abs=0.06)


def test_group_figures_by_hand():
    accuracy = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [1.0, NAN], [0.0, 1.0]])
    alone, pair = group_figures(accuracy, list("abcde"), ["x", "p", "p", "p", "p"])[::-1]
    assert (alone.group, alone.questions, alone.best_same) == ("x", 1, 1.0) and math.isnan(alone.best_held_out)
    assert pair.accuracy_N == pytest.approx([0.5, 2.5 / 3]) and pair.best_same == pytest.approx(2.5 / 3)
    assert over_groups([1.0, NAN], [alone, pair]) == 1.0
    assert over_groups([0.0, 1.0], [alone, pair]) == 0.8
    assert math.isnan(over_groups([NAN], [alone]))


def test_held_out_choice_by_hand():
    """Two questions, each with another best tag: a choice made on one is wrong on the other."""
    (figure,) = group_figures(np.array([[1.0, 0.0], [0.0, 1.0]]), ["a", "b"], ["g", "g"])
    assert (figure.best_same, figure.best_held_out) == (0.5, 0.0)


def test_halves_depend_on_ids_alone():
    ids = [f"q{i}" for i in range(32)]
    halves = dict(zip(ids, question_halves(ids)))
    assert sum(halves.values()) == 16
    assert halves == dict(zip(ids[::-1], question_halves(ids[::-1])))
    question_halves(["\ud800"])


# agreement


def enumerate_agreement(rows, i, j):
    """(share, chance): over explicit pairs of samples."""
    usable = [row for row in rows if (len(row[i]) > 1 if i == j else row[i] and row[j])]
    same = lambda a, b: a is not None and a == b  # noqa: E731
    within = []
    for row in usable:
        pairs = [(a, b) for s, a in enumerate(row[i]) for t, b in enumerate(row[j]) if i != j or s != t]
        within.append(share(same(a, b) for a, b in pairs))
    between = [share(same(a, b) for a in one[i] for b in other[j]) for one, other in itertools.permutations(usable, 2)]
    mean = lambda values: float(sum(values) / len(values)) if values else NAN  # noqa: E731
    return mean(within), mean(between)


def test_agreement_is_the_share_of_pairs():
    rng = random.Random(3)
    for _ in range(10):
        rows = [[[rng.choice(["a", "b", None]) for _ in range(rng.randrange(4))] for _ in range(3)] for _ in range(4)]
        result = agreement(rows)
        for i, j in itertools.product(range(3), repeat=2):
            within, between = enumerate_agreement(rows, i, j)
            kappa = NAN if between == 1 else (within - between) / (1 - between)
            np.testing.assert_allclose(result.share[i, j], within, atol=1e-12)
            np.testing.assert_allclose(result.chance_corrected[i, j], kappa, atol=1e-12)


def test_agreement_by_hand():
    always_c = agreement([[["C"], ["C"]]] * 3)
    assert always_c.share[0, 1] == 1 and math.isnan(always_c.chance_corrected[0, 1])  # nothing left to correct
    assert math.isnan(always_c.share[0, 0])  # one sample makes no pair
    open_answers = agreement([[["1"], ["1"]], [["2"], ["3"]]])
    assert open_answers.share[0, 1] == open_answers.chance_corrected[1, 0] == 0.5
    failures = agreement([[[None], [None]], [["1"], ["1"]]])
    assert failures.share[0, 1] == 0.5
    assert agreement([]).share.shape == (0, 0)


def test_tags_that_guess_alike_agree_by_chance_alone():
    rng = random.Random(0)
    rows = [[[rng.choice("AAAB") for _ in range(4)] for _ in range(2)] for _ in range(400)]
    result = agreement(rows)
    assert result.share[0, 1] == pytest.approx(0.625, abs=0.03)
    assert result.chance_corrected[0, 1] == pytest.approx(0, abs=0.06)
