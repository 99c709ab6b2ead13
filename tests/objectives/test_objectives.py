"""The objectives at the forking token, against closed forms, finite differences and naive sums."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from megatron_ssft.objectives.formulas.forking_policy import (
    ForkCoefficients,
    exact_objective,
    has_signal,
    log_policy,
    sample_advantages,
    sample_tags,
    sampled_objective,
)


def random_logp(rng, num_questions, num_tags, scale=1.0):
    """Log-probabilities of some tags of a larger vocabulary, so that their mass is less than 1."""
    logits = scale * rng.normal(size=(num_questions, num_tags + 3))
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[:, :num_tags]


def softmax(values):
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def regularisers(logp, reference, coefficients):
    """Of one question, term by term as the equations say it."""
    pi, pi_ref = softmax(logp), softmax(reference)
    kl = sum(p * math.log(p / r) for p, r in zip(pi, pi_ref))
    entropy = -sum(p * math.log(p) for p in pi)
    mass = sum(math.exp(z) for z in logp)
    return (
        -coefficients.kl * kl + coefficients.entropy * entropy,
        {"kl": kl, "entropy": entropy, "mass": mass},
    )


def differences(function, logp_QN, step=1e-5):
    """Central finite differences."""
    gradient = np.empty_like(logp_QN)
    for place in np.ndindex(*logp_QN.shape):
        moved = [logp_QN.copy(), logp_QN.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        gradient[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


COEFFICIENTS = [
    ForkCoefficients(kl=kl, entropy=entropy, group_normalization=normalize)
    for kl, entropy, normalize in itertools.product((0.0, 0.3), (0.0, 0.2), (False, True))
]


# -- the exact form ----------------------------------------------------------------------------------------------------


def test_policy_and_mass():
    logp = np.array([[math.log(0.2), math.log(0.1), math.log(0.1)], [-1e4, -1e4 + math.log(3), -2e4]])
    log_pi, log_mass = log_policy(logp)
    assert np.allclose(np.exp(log_pi), [[0.5, 0.25, 0.25], [0.25, 0.75, 0.0]], atol=1e-12)
    assert np.allclose(log_mass, [math.log(0.4), -1e4 + math.log(4)], rtol=1e-14)
    assert np.isfinite(log_pi).all()
    assert np.array_equal(log_policy(np.array([[0.0, 0.125]]) - 2.0**30)[0], log_policy(np.array([[0.0, 0.125]]))[0])


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.0])
def test_ascent_reaches_the_tabular_optimum(beta):
    rng = np.random.default_rng(int(10 * beta))
    reward, reference = rng.random((4, 6)), random_logp(rng, 4, 6)
    logp = random_logp(rng, 4, 6)
    for _ in range(4000):
        logp = logp + 4 / beta * exact_objective(logp, reward, reference, ForkCoefficients(kl=beta)).gradient_QN
    optimum = softmax(reference) * np.exp(reward / beta)
    optimum /= optimum.sum(axis=1, keepdims=True)
    assert np.abs(softmax(logp) - optimum).max() < 1e-3
    assert np.abs(softmax(reference) - optimum).max() > 0.02  # it had a way to go


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_exact_value_and_gradient(coefficients):
    rng = np.random.default_rng(3)
    logp, reference = random_logp(rng, 3, 5), random_logp(rng, 3, 5)
    reward = np.concatenate([rng.random((2, 5)), rng.normal(0.5, 3.0, (1, 5))])  # the last question: any reals
    frozen_mean = (softmax(logp) * reward).sum(axis=1)
    frozen_sigma = np.array([math.sqrt(max(0.0, mean * (1 - mean))) for mean in frozen_mean])

    def value(moved):
        total = 0.0
        for q in range(3):
            expected = softmax(moved[q]) @ reward[q]
            if coefficients.group_normalization:
                expected = (expected - frozen_mean[q]) / (frozen_sigma[q] + 1e-4)
            total += expected + regularisers(moved[q], reference[q], coefficients)[0]
        return total / 3

    objective = exact_objective(logp, reward, reference, coefficients)
    assert abs(objective.value - value(logp)) < 1e-12
    expected_gradient = differences(value, logp)
    scale = max(1.0, np.abs(expected_gradient).max())  # sigma near 0 makes the gradient large
    assert objective.gradient_QN.dtype == np.float64
    assert np.abs(objective.gradient_QN - expected_gradient).max() < 1e-6 * scale
    assert abs(objective.figures["reward"] - frozen_mean.mean()) < 1e-12
    each = [regularisers(logp[q], reference[q], coefficients)[1] for q in range(3)]
    for name in ("kl", "entropy", "mass"):
        assert abs(objective.figures[name] - np.mean([one[name] for one in each])) < 1e-12


def test_normalisation_divides_by_the_deviation():
    logp, reward = np.log([[0.4, 0.2]]), np.array([[0.9, 0.3]])
    expected = 2 / 3 * 0.9 + 1 / 3 * 0.3  # 0.7
    plain = exact_objective(logp, reward, logp, ForkCoefficients())
    normalized = exact_objective(logp, reward, logp, ForkCoefficients(group_normalization=True))
    assert np.allclose(normalized.gradient_QN * (math.sqrt(expected * 0.3) + 1e-4), plain.gradient_QN, atol=1e-15)
    assert plain.figures == normalized.figures and plain.value == plain.figures["reward"]
    assert normalized.value == 0.0


def test_nothing_to_gain_is_no_gradient():
    logp = np.log([[0.4, 0.2, 0.1], [1e-30, 1e-3, 1e-3]])
    for reward, normalize in itertools.product((0.0, 1.0), (False, True)):
        objective = exact_objective(
            logp, np.full((2, 3), reward), logp, ForkCoefficients(group_normalization=normalize, kl=1.0)
        )
        assert np.abs(objective.gradient_QN).max() < 1e-10, (reward, normalize)
        assert abs(objective.figures["kl"]) < 1e-15


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("natural", [False, True])
def test_questions_of_equal_rewards_have_no_part(coefficients, natural):
    rng = np.random.default_rng(1)
    coefficients = dataclasses.replace(coefficients, natural=natural)
    logp, reference, reward = random_logp(rng, 5, 4), random_logp(rng, 5, 4), rng.random((5, 4))
    reward[1], reward[3] = 0.0, [0.3, 0.1 + 0.2, 0.3, 0.3]  # equal but for rounding
    some = [0, 2, 4]
    assert has_signal(reward).tolist() == [True, False, True, False, True]
    mixed = exact_objective(logp, reward, reference, coefficients)
    alone = exact_objective(logp[some], reward[some], reference[some], coefficients)
    np.testing.assert_allclose(mixed.gradient_QN[some], alone.gradient_QN, rtol=1e-12)
    assert not mixed.gradient_QN[[1, 3]].any() and mixed.value == pytest.approx(alone.value, rel=1e-12)
    none = exact_objective(logp[[1, 3]], reward[[1, 3]], reference[[1, 3]], coefficients)
    assert none.value == 0.0 and not none.gradient_QN.any()
    assert none.figures["reward"] == pytest.approx(0.15)  # of all questions, as entropy, KL and mass


def test_sampled_questions_without_signal_have_no_part():
    rng = np.random.default_rng(2)
    logp, old, reference = (random_logp(rng, 4, 3) for _ in range(3))
    tags, reward = rng.integers(0, 3, (4, 6)), rng.integers(0, 2, (4, 6)).astype(float)
    coefficients, some = ForkCoefficients(kl=0.2, entropy=0.1), [0, 3]
    signal = np.array([True, False, False, True])
    mixed = sampled_objective(logp, old, tags, reward, reference, coefficients, signal)
    alone = sampled_objective(*(a[some] for a in (logp, old, tags, reward, reference)), coefficients)
    np.testing.assert_allclose(mixed.gradient_QN[some], alone.gradient_QN, rtol=1e-12)
    assert not mixed.gradient_QN[[1, 2]].any() and mixed.value == pytest.approx(alone.value, rel=1e-12)


# -- the natural gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_natural_direction_is_the_gradient_through_the_inverse_fisher_matrix(coefficients):
    """Both from finite differences: F is the second derivative of KL(pi || pi moved) at pi."""
    rng = np.random.default_rng(7)
    logp, reference, reward = random_logp(rng, 1, 4), random_logp(rng, 1, 4), rng.random((1, 4))
    mean = float(softmax(logp[0]) @ reward[0])
    scale = 1 / (math.sqrt(mean * (1 - mean)) + 1e-4) if coefficients.group_normalization else 1.0

    def value(moved):
        return scale * (softmax(moved[0]) @ reward[0]) + regularisers(moved[0], reference[0], coefficients)[0]

    def divergence_slope(moved):
        pi = softmax(logp[0])
        return lambda place: (softmax(moved[0]) - pi)[place]  # d KL(pi || pi_moved) / d logp

    fisher = np.stack([differences(lambda m, i=i: divergence_slope(m)(i), logp)[0] for i in range(4)])
    direction = exact_objective(logp, reward, reference, dataclasses.replace(coefficients, natural=True)).gradient_QN[0]
    np.testing.assert_allclose(4 * fisher @ direction, differences(value, logp)[0], atol=1e-8)
    assert abs(direction.sum()) < 1e-15  # and pushes no tag but against the others


def test_natural_and_plain_gradient_are_one_where_the_policy_is_uniform():
    rng = np.random.default_rng(8)
    reference, reward = random_logp(rng, 3, 5), rng.random((3, 5))
    for coefficients in COEFFICIENTS:
        plain, natural = (
            exact_objective(
                np.full((3, 5), -2.0), reward, reference, dataclasses.replace(coefficients, natural=natural)
            )
            for natural in (False, True)
        )
        np.testing.assert_allclose(natural.gradient_QN, plain.gradient_QN, atol=1e-15)
        assert natural.value == plain.value and natural.figures == plain.figures


def test_natural_ascent_is_mirror_descent():
    """Without regularisers the policy after steps of total length t is pi_0 exp(t R / N), to rounding."""
    rng = np.random.default_rng(9)
    logp, reward = random_logp(rng, 3, 6), rng.random((3, 6))
    moved = logp
    for _ in range(50):
        moved = moved + 3 * exact_objective(moved, reward, logp, ForkCoefficients(natural=True)).gradient_QN * 6 / 1.5
    expected = softmax(logp) * np.exp(50 * 3 / 1.5 * reward / 3)  # the mean is over 3 questions
    np.testing.assert_allclose(softmax(moved), expected / expected.sum(axis=1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("kl, entropy", [(0.02, 0.0), (0.0, 0.02), (0.1, 0.05), (1.0, 0.0)])
def test_natural_ascent_reaches_the_tabular_optimum_from_near_certainty(kl, entropy):
    """It does so from a policy that is nearly certain of a bad tag, which the plain gradient hardly leaves."""
    rng = np.random.default_rng(10)
    reward, reference = rng.random((4, 6)), random_logp(rng, 4, 6)
    start = np.full((4, 6), -12.0)
    start[np.arange(4), reward.argmin(axis=1)] = -0.1
    optimum = softmax((reward + kl * np.log(softmax(reference))) / (kl + entropy))
    ended = {}
    for natural in (False, True):
        moved, coefficients = start, ForkCoefficients(kl=kl, entropy=entropy, natural=natural)
        for _ in range(100):
            gradient = exact_objective(moved, reward, reference, coefficients).gradient_QN
            moved = moved + 4 * 6 * 0.2 / (kl + entropy) * gradient
        ended[natural] = np.abs(softmax(moved) - optimum).max()
    assert ended[True] < 1e-8
    assert ended[False] > 1e-3 or kl == 1.0
    assert (
        not np.abs(
            exact_objective(
                np.log(optimum), reward, reference, ForkCoefficients(kl=kl, entropy=entropy, natural=True)
            ).gradient_QN
        ).max()
        > 1e-12
    )


def test_drawn_tags_have_no_natural_gradient():
    logp = np.log([[0.4, 0.2]])
    with pytest.raises(AssertionError, match="no natural gradient"):
        sampled_objective(logp, logp, np.zeros((1, 2), int), np.zeros((1, 2)), logp, ForkCoefficients(natural=True))


def test_bad_values_name_the_row():
    good = np.log(np.full((3, 2), 0.25))
    for bad in (math.nan, math.inf, -math.inf):
        broken = good.copy()
        broken[1, 0] = bad
        for arguments in ((broken, good, good), (good, broken, good), (good, good, broken)):
            with pytest.raises(ValueError, match="row 1"):
                exact_objective(*arguments, ForkCoefficients())
        with pytest.raises(ValueError, match="row 1"):
            sampled_objective(good, good, np.zeros((3, 2), int), broken, good, ForkCoefficients())
        with pytest.raises(ValueError, match="row 1"):
            sampled_objective(good, broken, np.zeros((3, 2), int), good, good, ForkCoefficients())
    with pytest.raises(AssertionError):
        exact_objective(good, good[:, :1], good, ForkCoefficients())
    with pytest.raises(AssertionError):
        exact_objective(good, good, good[:1], ForkCoefficients())
    with pytest.raises(AssertionError):
        sampled_objective(good, good, np.full((3, 2), 2), good, good, ForkCoefficients())


def test_needs_no_torch():
    program = (
        "import sys, megatron_ssft.objectives.formulas.forking_policy, megatron_ssft.objectives.formulas.drift; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


# -- the sampled form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 5])
def test_sampled_gradients_average_to_the_exact_one(samples):
    draws, num_tags = 10_000, 4
    rng = np.random.default_rng(11)
    logp, reference = random_logp(rng, 1, num_tags), random_logp(rng, 1, num_tags)
    n, total = np.array([[4, 2, 8, 5]]), np.array([[4, 1, 2, 0]])
    coefficients = ForkCoefficients(kl=0.1, entropy=0.05)
    exact = exact_objective(logp, total / n, reference, coefficients)

    def repeat(row):
        return np.repeat(row, draws, axis=0)

    rngs = [np.random.default_rng([samples, draw]) for draw in range(draws)]
    tags, reward = sample_tags(repeat(logp), repeat(n), repeat(total), samples, rngs)
    sampled = sampled_objective(repeat(logp), repeat(logp), tags, reward, repeat(reference), coefficients)
    each = sampled.gradient_QN * draws
    standard_error = each.std(axis=0, ddof=1) / math.sqrt(draws)
    assert (np.abs(each.mean(axis=0) - exact.gradient_QN[0]) < 3 * standard_error).all()
    assert (standard_error < 0.01).all() and np.abs(exact.gradient_QN).max() > 0.05  # it could have failed
    assert sampled.figures["clip_fraction"] == 0.0
    assert abs(sampled.figures["reward"] - exact.figures["reward"]) < 0.02
    for name in ("kl", "entropy", "mass"):
        assert abs(sampled.figures[name] - exact.figures[name]) < 1e-9


@pytest.mark.parametrize("normalize", [False, True])
def test_sampled_value_and_gradient(normalize):
    rng = np.random.default_rng(5)
    coefficients = ForkCoefficients(0.3, 0.2, group_normalization=normalize, clip_low=0.1, clip_high=0.3)
    old, reference = random_logp(rng, 8, 4), random_logp(rng, 8, 4)
    logp = old + rng.normal(0, 0.4, old.shape)
    tags, reward = rng.integers(0, 4, (8, 6)), rng.integers(0, 2, (8, 6)).astype(float)
    clipped = 0

    def value(moved):
        nonlocal clipped
        clipped, total = 0, 0.0
        for q in range(8):
            pi, pi_old = softmax(moved[q]), softmax(old[q])
            for g in range(6):
                if normalize:
                    advantage = (reward[q, g] - reward[q].mean()) / (reward[q].std(ddof=1) + 1e-4)
                else:
                    advantage = reward[q, g] - np.delete(reward[q], g).mean()
                ratio = pi[tags[q, g]] / pi_old[tags[q, g]]
                bounded = min(max(ratio, 0.9), 1.3)
                total += min(ratio * advantage, bounded * advantage) / 6
                clipped += bounded * advantage < ratio * advantage
            total += regularisers(moved[q], reference[q], coefficients)[0]
        return total / 8

    objective = sampled_objective(logp, old, tags, reward, reference, coefficients)
    assert abs(objective.value - value(logp)) < 1e-12
    assert clipped > 3 and objective.figures["clip_fraction"] == clipped / 48
    assert objective.figures["reward"] == reward.mean()
    assert np.abs(objective.gradient_QN - differences(value, logp)).max() < 1e-6


def test_clip_stops_one_side_only():
    old, logp = np.log([[0.25, 0.25]]), np.log([[0.4, 0.1]])  # ratios 1.6 and 0.4
    tags = np.array([[0, 1]])

    def objective(first, second, low=0.2, high=0.2):
        return sampled_objective(
            logp, old, tags, np.array([[first, second]]), old, ForkCoefficients(clip_low=low, clip_high=high)
        )

    further = objective(1.0, 0.0)  # has gone that way already
    assert not further.gradient_QN.any() and further.figures["clip_fraction"] == 1.0
    back = objective(0.0, 1.0)
    assert back.gradient_QN[0, 0] < -0.1 and back.gradient_QN[0, 1] > 0.1 and back.figures["clip_fraction"] == 0.0
    assert objective(1.0, 0.0, high=0.7).figures["clip_fraction"] == 0.5  # only the tag that lost
    assert objective(1.0, 0.0, low=0.7).figures["clip_fraction"] == 0.5  # only the tag that won
    assert not objective(0.5, 0.5).gradient_QN.any()


def test_ratios_do_not_overflow():
    logp, old = np.array([[-1.0, -900.0]]), np.array([[-1800.0, -1.0]])
    tags, reward = np.array([[0, 1]]), np.array([[0.0, 1.0]])
    objective = sampled_objective(logp, old, tags, reward, logp, ForkCoefficients())
    assert np.isfinite(objective.value) and np.isfinite(objective.gradient_QN).all()
    same = sampled_objective(logp, old, tags, np.ones((1, 2)), logp, ForkCoefficients())
    assert same.value == 0.0 and not same.gradient_QN.any()


def test_advantages_of_samples():
    reward = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, -1.0, 0.0, 0.0]])
    plain, normalized = sample_advantages(reward, False), sample_advantages(reward, True)
    assert np.allclose(plain[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3], atol=1e-15)
    assert np.allclose(plain[2], [3 + 1 / 3, -2, -2 / 3, -2 / 3], atol=1e-15)
    assert np.allclose(normalized[0], np.array([0.5, -0.5, -0.5, 0.5]) / (math.sqrt(1 / 3) + 1e-4), atol=1e-15)
    assert not plain[1].any() and not normalized[1].any()  # exactly, though a mean of such numbers is rounded
    for normalize in (False, True):
        assert not sample_advantages(np.array([[0.7], [0.2]]), normalize).any()


def test_drawn_tags_and_outcomes():
    pi = np.array([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.0, 0.9]])
    logp = np.log(np.maximum(0.3 * pi, 1e-320))
    n, total = np.array([[3, 4, 1, 1], [1, 2, 1, 4]]), np.array([[0.0, 4.0, 0.5, 1.0], [1.0, 0.5, 1.0, 1.0]])
    samples = 40_000
    tags, reward = sample_tags(logp, n, total, samples, [np.random.default_rng(seed) for seed in (1, 2)])
    assert tags.dtype == np.int64 and reward.dtype == np.float64 and set(np.unique(reward)) == {0.0, 1.0}
    for q in range(2):
        assert np.abs(np.bincount(tags[q], minlength=4) / samples - pi[q]).max() < 0.01
        for tag in set(tags[q]):
            assert pi[q, tag] > 0
            assert abs(reward[q, tags[q] == tag].mean() - total[q, tag] / n[q, tag]) < 0.03
    assert not reward[0, tags[0] == 0].any() and reward[0, tags[0] == 1].all()

    alone = sample_tags(logp[1:], n[1:], total[1:], samples, [np.random.default_rng(2)])
    assert np.array_equal(alone[0][0], tags[1]) and np.array_equal(alone[1][0], reward[1])
    with pytest.raises(AssertionError):
        sample_tags(logp, 0 * n, 0 * total, 4, [np.random.default_rng(seed) for seed in (1, 2)])


class Draws:
    """A generator that draws the same number for ever."""

    def __init__(self, number):
        self.number = number

    def random(self, shape):
        return np.full(shape, self.number)


def test_extreme_draws_stay_among_tags_with_a_probability():
    rng = np.random.default_rng(6)
    for _ in range(50):
        logp = np.concatenate([[[-2000.0]], random_logp(rng, 1, 7), [[-2000.0]]], axis=1)
        ones = np.ones_like(logp)
        for draw, tag in ((0.0, 1), (np.nextafter(1.0, 0.0), 7)):
            tags, reward = sample_tags(logp, ones, ones, 3, [Draws(draw)])
            assert (tags == tag).all() and reward.all()
            assert not sample_tags(logp, ones, 0 * ones, 3, [Draws(draw)])[1].any()
