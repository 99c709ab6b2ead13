"""How stale stored completions are: rewards measured on them describe a model that has moved since."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ssft.objectives.formulas.forking_policy import finite_rows


@dataclass(frozen=True)
class Drift:
    """Distance of the present weights from those that stored completions were drawn with."""

    effective_sample_size: float
    """Share in (0, 1] of the completions that independent draws from the present weights would need to be as good."""
    nll_shift: float
    """Nats per token by which the completions' negative log-likelihood has risen."""


def measure_drift(
    now_nll_sums_S: np.ndarray, then_nll_sums_S: np.ndarray, tokens_S: np.ndarray, noise: float = 0.0
) -> Drift:
    """Compare the likelihoods of S stored completions now and then.

    With the importance weights of whole completions, w = p_now / p_then = exp(then - now), the effective sample size is
    (sum w)^2 / (S sum w^2) (Kong 1992): 1 where nothing moved, 1/S where one completion has all the weight. A factor
    common to all weights does not show in it; the shift of the NLL shows that. It is the mean over all tokens, not over
    completions.

    Likelihoods of long completions in bfloat16 differ by whole nats between two measurements of the same weights, and
    so would the weights w. The deviations of log w from their mean are therefore scaled down until their variance is
    less by that of the noise, as that of the sum of drift and independent noise is more.

    Args:
        now_nll_sums_S: NLL of each completion in nats, summed over its tokens, under the present weights.
        then_nll_sums_S: the same under the weights that it was drawn with.
        tokens_S: tokens of each completion, > 0.
        noise: nats^2, variance of now - then where nothing has moved.

    Raises:
        ValueError: a value is NaN or infinite; names the completion by its index.
    """
    now_S, then_S = finite_rows("present NLL", now_nll_sums_S), finite_rows("earlier NLL", then_nll_sums_S)
    tokens_S = finite_rows("tokens", tokens_S)
    assert now_S.ndim == 1 and len(now_S) and now_S.shape == then_S.shape == tokens_S.shape, (
        now_S.shape,
        then_S.shape,
        tokens_S.shape,
    )
    assert (tokens_S > 0).all()
    log_weight_S = then_S - now_S
    shift = float(-log_weight_S.sum() / tokens_S.sum())
    mean, variance = log_weight_S.mean(), log_weight_S.var()
    if noise > 0 and variance > 0:
        log_weight_S = mean + (log_weight_S - mean) * np.sqrt(max(0.0, 1.0 - noise / variance))
    weight_S = np.exp(log_weight_S - log_weight_S.max())  # the largest is 1, so neither sum overflows or is 0
    effective = weight_S.sum() ** 2 / (len(weight_S) * (weight_S**2).sum())
    return Drift(min(1.0, float(effective)), shift)
