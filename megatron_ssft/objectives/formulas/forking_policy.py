"""Global Forking Policy Optimization: policy gradients at the forking token alone.

Of a question, `logp` are the log-probabilities of the N tags' whole token-id sequences at the forking position, under
the full vocabulary. They split into

    pi_i = exp(logp_i) / mass,     mass = sum_i exp(logp_i)       (the policy; its share of the vocabulary)

Tags are no prefixes of each other, so mass <= 1. A tag's mean reward R_i is known for every tag, hence so is the
expected reward J and its gradient, without sampling noise over the tags:

    J = sum_i pi_i R_i,                dJ / dlogp_i = pi_i (R_i - J)

What is maximised is J - kl KL(pi || pi_ref) + entropy H(pi), averaged over the questions with signal: those whose tags
differ in reward. The others have no part in it, neither in the sum nor in the number it is divided by. With the KL term
alone the optimum over all policies is pi_i proportional to pi_ref,i exp(R_i / kl).

The plain gradient of a tag dies with its pi_i: once a policy is nearly certain, a better tag is hardly heard. The
natural gradient (Amari 1998; Kakade, "A Natural Policy Gradient", 2001) is the plain one through the inverse of the
Fisher matrix diag(pi) - pi pi'. Over N tags it has a closed form, up to a constant that no softmax sees:

    D_i = R_i - kl log(pi_i / pi_ref,i) - entropy log pi_i,      direction_i = (D_i - mean_j D_j) / N

It vanishes exactly at the optimum, and is mirror descent towards it: its flow from pi_0 without the last two terms is
pi_i proportional to pi_0,i exp(t R_i / N). The 1 / N makes it the plain gradient where pi is uniform.

What raises the mass is another file's business: outside_mass.py.

The idea, policy gradients at the global forking token only, is that of arXiv 2510.05132. No official formula of its
loss, KL, clip or normalisation is published: those here are ours, and no parity is claimed. The sampled form follows
GRPO (arXiv 2402.03300) with the clip of PPO (arXiv 1707.06347); without normalisation its baseline is RLOO's (arXiv
2402.14740), the mean of a question's other samples.

Shapes: Q questions, N tags, G samples per question. All arrays are float64, logarithms are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMALIZATION_EPS = 1e-4
"""Added to the standard deviation that advantages are divided by, in units of the reward."""

SAME_REWARD = 1e-9
"""Mean rewards that differ by no more are the same: sums of fractions are rounded."""

MAX_LOG_RATIO = 700.0
"""Of a sample, in nats: the exponential of more is no longer a float64."""


@dataclass(frozen=True)
class ForkCoefficients:
    """Weights of the terms beside the expected reward, and how the gradient is taken."""

    kl: float = 0.0
    """Of KL(pi || pi_ref), subtracted. At 1 a nat of divergence costs as much as a whole point of reward."""
    entropy: float = 0.0
    """Of the entropy of pi, added."""
    natural: bool = False
    """Go in the direction of the natural gradient instead of the plain one (the exact form alone)."""
    group_normalization: bool = False
    """Divide a question's advantages by the standard deviation of its rewards, plus 1e-4."""
    clip_low: float = 0.2
    """The sampled form gains nothing by a ratio pi / pi_old below 1 - clip_low."""
    clip_high: float = 0.2
    """The sampled form gains nothing by a ratio pi / pi_old above 1 + clip_high."""


@dataclass(frozen=True)
class ForkObjective:
    """What is maximised, where it stands and where it goes."""

    value: float
    """Mean over the questions with signal of what is maximised; 0 where there are none."""
    gradient_QN: np.ndarray
    """Derivative of `value` by logp_QN, or the natural direction; the division by the number of questions is in it."""
    figures: dict[str, float]
    """Means over all questions: reward, entropy (nats), kl (nats), mass; of samples also clip_fraction."""


def log_policy(logp_QN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the tags among the tags [Q, N], and the logarithm of their joint probability [Q].

    Args:
        logp_QN: log-probability of each tag's ids; neither rows nor their exponentials need to sum to anything.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    logp_QN = finite_rows("log-probabilities of the tags", logp_QN)
    assert logp_QN.ndim == 2 and logp_QN.size, logp_QN.shape
    top_Q1 = logp_QN.max(axis=1, keepdims=True)
    shifted_QN = logp_QN - top_Q1
    log_sum_Q1 = np.log(np.exp(shifted_QN).sum(axis=1, keepdims=True))
    # Not logp - log_mass: far below zero, where a policy may lie, that would round away the differences between tags.
    return shifted_QN - log_sum_Q1, (top_Q1 + log_sum_Q1)[:, 0]


def has_signal(reward_QN: np.ndarray) -> np.ndarray:
    """bool [Q]: whether the tags of a question differ in reward, so that there is something to choose."""
    return np.ptp(np.asarray(reward_QN, dtype=np.float64), axis=1) > SAME_REWARD


def exact_objective(
    logp_QN: np.ndarray, reward_QN: np.ndarray, reference_logp_QN: np.ndarray, coefficients: ForkCoefficients
) -> ForkObjective:
    """The expected reward over all N tags with its regularisers, and their exact gradient, plain or natural.

    With group normalisation the advantages R_i - J are divided by sigma + 1e-4, sigma = sqrt(J (1 - J)): the standard
    deviation of a 0/1 reward when the tag is drawn from pi, so that questions that are nearly always or nearly never
    solved weigh more. J and sigma are constants to the gradient. The reward's part of `value` is then the surrogate
    sum_i pi_i (R_i - const J) / (const sigma + 1e-4), which is 0 where it is taken, whatever the rewards, as is GRPO's;
    only its gradient says anything. `figures["reward"]` is J in any case.

    Args:
        logp_QN: under the weights that are trained.
        reward_QN: mean reward of each tag, any finite numbers; where J lies outside [0, 1], sigma counts as 0.
        reference_logp_QN: under the frozen weights, as `logp_QN`; its softmax is pi_ref.
        coefficients: the clip is without use here.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    log_pi_QN, log_mass_Q = log_policy(logp_QN)
    reward_QN = finite_rows("rewards", reward_QN)
    assert reward_QN.shape == log_pi_QN.shape, (reward_QN.shape, log_pi_QN.shape)
    pi_QN = np.exp(log_pi_QN)
    expected_Q1 = (pi_QN * reward_QN).sum(axis=1, keepdims=True)
    advantage_QN = reward_QN - expected_Q1
    value_Q = expected_Q1[:, 0]
    if coefficients.group_normalization:
        advantage_QN = advantage_QN / (np.sqrt(np.maximum(expected_Q1 * (1.0 - expected_Q1), 0.0)) + NORMALIZATION_EPS)
        value_Q = np.zeros_like(value_Q)
    figures = {"reward": float(expected_Q1.mean())}
    regularised = _regularise(log_pi_QN, log_mass_Q, reference_logp_QN, coefficients)
    worth_QN = advantage_QN + regularised.worth_QN
    if coefficients.natural:
        gradient_QN = (worth_QN - worth_QN.mean(axis=1, keepdims=True)) / worth_QN.shape[1]
    else:
        gradient_QN = pi_QN * (worth_QN - (pi_QN * worth_QN).sum(axis=1, keepdims=True))
    return _mean_over_signal(
        value_Q + regularised.value_Q, gradient_QN, figures | regularised.figures, has_signal(reward_QN)
    )


def sampled_objective(
    logp_QN: np.ndarray,
    old_logp_QN: np.ndarray,
    tags_QG: np.ndarray,
    reward_QG: np.ndarray,
    reference_logp_QN: np.ndarray,
    coefficients: ForkCoefficients,
    signal_Q: np.ndarray | None = None,
) -> ForkObjective:
    """The reward's part estimated from G tags per question drawn from an older policy; the regularisers exact as above.

        1/G sum_g min(ratio_g A_g, clip(ratio_g, 1 - clip_low, 1 + clip_high) A_g),   ratio = pi(tag) / pi_old(tag)

    A_g are `sample_advantages`. Every rollout counts the same, however long its completion is. Where pi_old is pi and
    there is no group normalisation, the gradient's expectation is that of `exact_objective`; the value then is near 0.

    Args:
        logp_QN: under the weights that are trained.
        old_logp_QN: under the weights that the tags were drawn with.
        tags_QG: integers, 0-based.
        reward_QG: reward of each sample.
        reference_logp_QN: under the frozen weights.
        coefficients: without the natural gradient, which takes the rewards of all tags.
        signal_Q: bool, `has_signal` of the stored rewards; None: all questions have signal. Not to be judged by the
            draws: samples that happen to be equal say as much as others.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    assert not coefficients.natural, "of drawn tags there is no natural gradient"
    log_pi_QN, log_mass_Q = log_policy(logp_QN)
    old_log_pi_QN, _ = log_policy(old_logp_QN)
    reward_QG, tags_QG = finite_rows("rewards", reward_QG), np.asarray(tags_QG)
    num_questions, num_tags = log_pi_QN.shape
    assert old_log_pi_QN.shape == log_pi_QN.shape, (old_log_pi_QN.shape, log_pi_QN.shape)
    assert reward_QG.shape == tags_QG.shape and tags_QG.ndim == 2, (reward_QG.shape, tags_QG.shape)
    assert len(tags_QG) == num_questions and tags_QG.size, tags_QG.shape
    assert np.issubdtype(tags_QG.dtype, np.integer) and tags_QG.min() >= 0 and tags_QG.max() < num_tags

    samples = tags_QG.shape[1]
    advantage_QG = sample_advantages(reward_QG, coefficients.group_normalization)
    log_ratio_QG = np.take_along_axis(log_pi_QN - old_log_pi_QN, tags_QG, axis=1)
    ratio_QG = np.exp(np.minimum(log_ratio_QG, MAX_LOG_RATIO))
    low, high = 1.0 - coefficients.clip_low, 1.0 + coefficients.clip_high
    clipped_QG = ((advantage_QG > 0) & (ratio_QG > high)) | ((advantage_QG < 0) & (ratio_QG < low))
    gain_QG = advantage_QG * ratio_QG
    value_Q = np.where(clipped_QG, advantage_QG * np.clip(ratio_QG, low, high), gain_QG).mean(axis=1)

    # dratio / dlogp_j = ratio (delta_tag,j - pi_j), and nothing passes where the clip is active.
    passed_QG = np.where(clipped_QG, 0.0, gain_QG) / samples
    gradient_QN = -np.exp(log_pi_QN) * passed_QG.sum(axis=1, keepdims=True)
    np.add.at(gradient_QN, (np.arange(num_questions)[:, None], tags_QG), passed_QG)
    figures = {"reward": float(reward_QG.mean()), "clip_fraction": float(clipped_QG.mean())}
    regularised = _regularise(log_pi_QN, log_mass_Q, reference_logp_QN, coefficients)
    worth_QN, pi_QN = regularised.worth_QN, np.exp(log_pi_QN)
    gradient_QN += pi_QN * (worth_QN - (pi_QN * worth_QN).sum(axis=1, keepdims=True))
    signal_Q = np.ones(num_questions, dtype=bool) if signal_Q is None else signal_Q
    return _mean_over_signal(value_Q + regularised.value_Q, gradient_QN, figures | regularised.figures, signal_Q)


def sample_advantages(reward_QG: np.ndarray, normalize: bool) -> np.ndarray:
    """How much better each of a question's G samples did than the others, [Q, G].

    With `normalize`, GRPO's (r - mean) / (std + 1e-4), arXiv 2402.03300, the deviation being that of a sample
    (G - 1 in the denominator). Without, r minus the mean of the other G - 1 samples (RLOO, arXiv 2402.14740): this
    baseline does not depend on the sample itself, so the policy gradient is unbiased. One sample, and samples of equal
    reward, say nothing and get exact zeros.
    """
    reward_QG = finite_rows("rewards", reward_QG)
    assert reward_QG.ndim == 2, reward_QG.shape
    samples = reward_QG.shape[1]
    if samples < 2:
        return np.zeros_like(reward_QG)
    advantage_QG = reward_QG - reward_QG.mean(axis=1, keepdims=True)
    if normalize:
        advantage_QG /= reward_QG.std(axis=1, ddof=1, keepdims=True) + NORMALIZATION_EPS
    else:
        advantage_QG *= samples / (samples - 1)  # r - (G mean - r) / (G - 1)
    equal_Q1 = reward_QG.max(axis=1, keepdims=True) == reward_QG.min(axis=1, keepdims=True)
    return np.where(equal_Q1, 0.0, advantage_QG)


def sample_tags(
    old_logp_QN: np.ndarray,
    n_QN: np.ndarray,
    sum_QN: np.ndarray,
    samples: int,
    rngs: Sequence[np.random.Generator],
) -> tuple[np.ndarray, np.ndarray]:
    """Draw tags from the policy and for each draw one of the outcomes that are stored of its tag, with replacement.

    A reward is 1 with probability sum / n, else 0: the tag's mean reward in expectation, also where rewards are not
    0/1.

    Args:
        old_logp_QN: log-probabilities of the tags.
        n_QN: stored completions of each tag, all > 0.
        sum_QN: sum of their rewards, in [0, n].
        samples: G > 0.
        rngs: one generator per question, so that a question's draws do not depend on its neighbours in a batch.

    Returns:
        0-based tags [Q, G] int64, rewards [Q, G] float64.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    log_pi_QN, _ = log_policy(old_logp_QN)
    n_QN, sum_QN = finite_rows("counts", n_QN), finite_rows("sums of rewards", sum_QN)
    assert n_QN.shape == sum_QN.shape == log_pi_QN.shape, (n_QN.shape, sum_QN.shape, log_pi_QN.shape)
    assert (n_QN > 0).all() and (sum_QN >= 0).all() and (sum_QN <= n_QN).all()
    assert samples > 0 and len(rngs) == len(log_pi_QN), (samples, len(rngs))
    tags_QG = np.empty((len(log_pi_QN), samples), dtype=np.int64)
    reward_QG = np.empty((len(log_pi_QN), samples), dtype=np.float64)
    for question, rng in enumerate(rngs):
        for_tags, for_rewards = rng.random((2, samples))
        cumulative = np.cumsum(np.exp(log_pi_QN[question]))
        # The last is exactly 1 then and a draw less than 1, so none falls behind it; nor on a tag of probability 0.
        tags = np.searchsorted(cumulative / cumulative[-1], for_tags, side="right")
        tags_QG[question] = tags
        reward_QG[question] = for_rewards < (sum_QN[question] / n_QN[question])[tags]
    return tags_QG, reward_QG


def finite_rows(what: str, values: np.ndarray) -> np.ndarray:
    """`values` in float64.

    Raises:
        ValueError: a value is NaN or infinite; names the first such row (index of the first axis) of `what`.
    """
    values = np.asarray(values, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{what}, row {bad[0][0]}: not finite: {values[tuple(bad[0])]}")
    return values


@dataclass(frozen=True)
class _Regularised:
    """KL and entropy of each question."""

    value_Q: np.ndarray
    """-kl KL(pi || pi_ref) + entropy H(pi)"""
    worth_QN: np.ndarray
    """-kl log(pi / pi_ref) - entropy log pi, added to a tag's reward. The gradient is pi (worth - mean under pi)."""
    figures: dict[str, float]


def _regularise(
    log_pi_QN: np.ndarray, log_mass_Q: np.ndarray, reference_logp_QN: np.ndarray, coefficients: ForkCoefficients
) -> _Regularised:
    """The exact KL and entropy terms.

    From dlog pi_i / dlogp_j = delta_ij - pi_j follow

        dKL/dlogp_j = pi_j (log pi_j - log pi_ref,j - KL),      dH/dlogp_j = -pi_j (log pi_j + H)
    """
    reference_log_pi_QN, _ = log_policy(reference_logp_QN)
    assert reference_log_pi_QN.shape == log_pi_QN.shape, (reference_log_pi_QN.shape, log_pi_QN.shape)
    pi_QN = np.exp(log_pi_QN)
    log_ratio_QN = log_pi_QN - reference_log_pi_QN
    kl_Q = (pi_QN * log_ratio_QN).sum(axis=1)
    entropy_Q = -(pi_QN * log_pi_QN).sum(axis=1)
    figures = {
        "entropy": float(entropy_Q.mean()),
        "kl": float(kl_Q.mean()),
        "mass": float(np.exp(log_mass_Q).mean()),
    }
    return _Regularised(
        value_Q=coefficients.entropy * entropy_Q - coefficients.kl * kl_Q,
        worth_QN=-coefficients.kl * log_ratio_QN - coefficients.entropy * log_pi_QN,
        figures=figures,
    )


def _mean_over_signal(
    value_Q: np.ndarray, gradient_QN: np.ndarray, figures: dict[str, float], signal_Q: np.ndarray
) -> ForkObjective:
    """The mean over the questions with signal; the others get no gradient."""
    assert signal_Q.shape == value_Q.shape and signal_Q.dtype == bool, (signal_Q.shape, signal_Q.dtype)
    count = max(1, int(signal_Q.sum()))
    value = float(value_Q[signal_Q].sum()) / count
    return ForkObjective(value, np.where(signal_Q[:, None], gradient_QN, 0.0) / count, figures)
