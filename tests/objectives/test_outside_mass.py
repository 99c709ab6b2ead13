"""Raising the tags' joint probability leaves the choice among them: in tables of logits, against finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.objectives.formulas.forking_policy import ForkCoefficients, exact_objective
from megatron_ssft.objectives.formulas.outside_mass import HOLD, TagTree, hold

FLAT = ((5,), (3,), (4,))
SHARED_START = ((1, 2, 5), (1, 2, 3), (1, 2, 0))
SHARED_ENDS = ((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 0, 4))
DEEP = ((1, 5), (1, 0, 2, 5), (1, 0, 2, 4), (1, 3, 2))
VOCABULARY = 7


class Table:
    """Logits of every prefix of the tags: float64 [VOCABULARY] each."""

    def __init__(self, tags, seed=0, scale=1.5):
        rng = np.random.default_rng(seed)
        self.tags = tags
        self.logits = {prefix: scale * rng.normal(size=VOCABULARY) for prefix in self.prefixes()}

    def prefixes(self):
        return sorted({tag[:place] for tag in self.tags for place in range(len(tag))})

    def logp(self):
        """[1, N, T]"""
        found = np.zeros((1, len(self.tags), max(map(len, self.tags))))
        for number, tag in enumerate(self.tags):
            for place, token in enumerate(tag):
                logits = self.logits[tag[:place]]
                found[0, number, place] = logits[token] - np.log(np.exp(logits).sum())
        return found

    def log_mass(self):
        return float(np.log(np.exp(self.logp().sum(axis=2)).sum()))

    def policy(self):
        p_N = np.exp(self.logp().sum(axis=2)[0])
        return p_N / p_N.sum()

    def gradient(self, weight_NT):
        """Derivative by the logits of sum(weight x log-probability of the tag's token)."""
        slopes = {prefix: np.zeros(VOCABULARY) for prefix in self.logits}
        for number, tag in enumerate(self.tags):
            for place, token in enumerate(tag):
                logits, weight = self.logits[tag[:place]], weight_NT[number, place]
                slopes[tag[:place]] -= weight * np.exp(logits) / np.exp(logits).sum()
                slopes[tag[:place]][token] += weight
        return slopes

    def move(self, slopes, length):
        for prefix, slope in slopes.items():
            self.logits[prefix] = self.logits[prefix] + length * slope


def entropy(pi):
    return -(pi * np.log(pi)).sum()


@pytest.mark.parametrize("tags", [FLAT, SHARED_START], ids=["flat", "shared start"])
def test_choice_stays_while_the_mass_rises_to_one(tags):
    table = Table(tags)
    before, mass = table.policy(), table.log_mass()
    for _ in range(400):
        table.move(table.gradient(TagTree(tags).push(table.logp())[0]), 1.0)
    assert mass < np.log(0.5) and table.log_mass() > np.log(0.98)
    np.testing.assert_allclose(table.policy(), before, rtol=1e-9)


def test_thirty_steps_with_nothing_to_choose_keep_the_entropy():
    """The weights of d log(mass) take it away, from the same table."""
    ended = {}
    for form in ("push", "gradient of log mass"):
        table = Table(FLAT, scale=0.7)
        start = entropy(table.policy())
        for _ in range(30):
            logp_QNT = table.logp()
            objective = exact_objective(
                logp_QNT.sum(axis=2), np.full((1, 3), 0.5), np.zeros((1, 3)), ForkCoefficients(kl=0.1, entropy=0.1)
            )
            weight_NT = TagTree(FLAT).push(logp_QNT)[0] if form == "push" else table.policy()[:, None]
            table.move(table.gradient(weight_NT + objective.gradient_QN[0][:, None]), 3.0)
        ended[form] = entropy(table.policy()) - start
    assert abs(ended["push"]) < 1e-12
    assert ended["gradient of log mass"] < -0.01


@pytest.mark.parametrize("seed", range(3))
def test_flat_tags_are_all_pushed_alike_as_far_as_the_mass_lacks(seed):
    table = Table(FLAT, seed)
    weight = TagTree(FLAT).push(table.logp())[0]
    mass = np.exp(table.log_mass())
    np.testing.assert_allclose(weight[:, 0], (1 - mass) / 3 + np.exp(table.logp()[0, :, 0]), rtol=1e-12)
    (slope,) = table.gradient(weight).values()
    p = np.exp(table.logits[()]) / np.exp(table.logits[()]).sum()
    inside = [5, 3, 4]
    outside = [token for token in range(VOCABULARY) if token not in inside]
    np.testing.assert_allclose(slope[inside], (1 - mass) / 3, rtol=1e-12)
    # As log(mass) itself: by finite differences of the other logits, and of all tags' logits together.
    for moved in [[token] for token in outside] + [inside]:
        values = []
        for step in (1e-5, -1e-5):
            other = Table(FLAT, seed)
            other.logits[()][moved] += step
            values.append(other.log_mass())
        assert slope[moved].sum() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-9)
    np.testing.assert_allclose(slope[outside], -p[outside], rtol=1e-12)


@pytest.mark.parametrize("tags", [FLAT, SHARED_START, SHARED_ENDS, DEEP], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_mass_rises_and_the_choice_at_every_prefix_stays(tags, seed):
    table = Table(tags, seed)
    before, mass = {prefix: logits.copy() for prefix, logits in table.logits.items()}, table.log_mass()
    for _ in range(10):
        table.move(table.gradient(TagTree(tags).push(table.logp())[0]), 0.3)
        assert table.log_mass() > mass
        mass = table.log_mass()
    for prefix, logits in table.logits.items():
        tokens = sorted({tag[len(prefix)] for tag in tags if tag[: len(prefix)] == prefix and len(tag) > len(prefix)})
        raised = (logits - before[prefix])[tokens]
        np.testing.assert_allclose(raised, raised[0], rtol=1e-9)


def test_weights_stand_at_tokens_alone_and_add_up_to_their_number():
    """One for the path that all share; what tags have to themselves adds up to one at each place as well."""
    weight = TagTree(SHARED_ENDS).push(Table(SHARED_ENDS).logp())[0]
    np.testing.assert_allclose(weight.sum(axis=0), 1.0, rtol=1e-12)
    deep = TagTree(DEEP).push(Table(DEEP).logp())[0]
    assert not deep[0, 2:].any() and not deep[3, 3:].any() and (deep[1] > 0).all()
    np.testing.assert_allclose(deep[:, 0], 0.25, rtol=1e-12)  # copies of one token share its weight


def kl(reference_N, logp_N):
    p, q = np.exp(reference_N - np.log(np.exp(reference_N).sum())), np.exp(logp_N - np.log(np.exp(logp_N).sum()))
    return float((p * np.log(p / q)).sum())


def test_hold_is_the_slope_of_the_divergence_as_far_as_the_mass_lacks():
    rng = np.random.default_rng(4)
    logp, reference = rng.normal(-3, 1, (3, 4)), rng.normal(-3, 1, (3, 4))
    found = hold(logp, reference, np.array([True, False, True]))
    assert not found[1].any()
    for q in (0, 2):
        mass, slope = np.exp(logp[q]).sum(), []
        for tag in range(4):
            moved = [logp[q] + step * (np.arange(4) == tag) for step in (1e-5, -1e-5)]
            slope.append(-(kl(reference[q], moved[0]) - kl(reference[q], moved[1])) / 2e-5)
        np.testing.assert_allclose(found[q], HOLD * (1 - mass) * np.array(slope), atol=1e-8)
    assert not hold(logp, logp + 2.0, np.ones(3, bool)).any()  # the same choice with another mass
    assert not hold(np.log([[0.75, 0.25]]), np.log([[0.1, 0.2]]), np.ones(1, bool)).any()  # nothing is left to raise


def shared_weights(steps, held, seed):
    """Entropy of the choice and mass, before and after the push, where tags share a hidden layer. Adam, by hand."""
    rng = np.random.default_rng(seed)
    inputs, w1, w2 = rng.normal(size=(16, 8)), rng.normal(size=(8, 24)) / 3, 1.5 * rng.normal(size=(24, 40))
    w2[:, :6] += rng.normal(size=6) / 3
    weights, tree = [w1, w2], TagTree([(tag,) for tag in range(6)])
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    reference = None
    for step in range(1, steps + 2):
        hidden = np.tanh(inputs @ weights[0])
        logits = hidden @ weights[1]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        logp = np.log(p[:, :6])
        reference = logp if reference is None else reference
        pi = p[:, :6] / p[:, :6].sum(axis=1, keepdims=True)
        figures = entropy(pi) / 16, p[:, :6].sum(axis=1).mean(), kl_mean(reference, logp)
        if step == 1:
            before = figures
        weight = tree.push(logp[:, :, None])[:, :, 0] + held * hold(logp, reference, np.ones(16, bool))
        slope = -p * weight.sum(axis=1, keepdims=True)
        slope[:, :6] += weight
        back = (slope @ weights[1].T) * (1 - hidden**2)
        for i, gradient in enumerate((inputs.T @ back, hidden.T @ slope)):
            m, v = moments[i]
            m[:], v[:] = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            weights[i] = weights[i] + 3e-3 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return before, figures


def kl_mean(reference, logp):
    return float(np.mean([kl(r, z) for r, z in zip(reference, logp)]))


@pytest.mark.parametrize("seed", range(3))
def test_shared_weights_do_not_move_the_choice_of_held_questions(seed):
    (_, mass, _), (_, raised, moved) = shared_weights(300, 1.0, seed)
    _, (_, _, moved_freely) = shared_weights(300, 0.0, seed)
    assert mass < 0.2 and raised > 0.85
    assert moved < 0.05 and moved_freely > 10 * moved


def test_probabilities_beyond_one_by_rounding_push_nothing_down():
    logp = np.log(np.array([[[0.5], [0.5 + 1e-7]]]))
    assert (TagTree(((0,), (1,))).push(logp) <= 0.5 + 1e-7).all()
