"""Token-level GRPO on whole completions: the baseline that the policy at the forking token is compared with.

GRPO is DeepSeekMath, arXiv 2402.03300; its clip is PPO's, arXiv 1707.06347; bounds that differ are usual since. How
tokens are averaged (over the tokens of a completion first, or over all tokens of a batch) is in the weights that
callers give.

Shapes: T scored tokens, of any number of completions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ssft.objectives.formulas.forking_policy import sample_advantages

LINEAR_FROM = 20.0
"""Log-ratio in nats from which on its exponential goes on as its tangent, so that no token can overflow float32."""


def group_advantages(rewards: list[np.ndarray], normalize: bool) -> list[np.ndarray]:
    """Advantages of completions, of each question those of its own group; groups may differ in size.

    The rules are those of `sample_advantages`: GRPO's (r - mean) / (std + 1e-4) with `normalize`, else r minus the mean
    of the others. A group of one, or of equal rewards, gives zeros.

    Args:
        rewards: of each question those of its completions, [G].

    Returns:
        The same shapes in float64.

    Raises:
        ValueError: a reward is NaN or infinite; names the group.
    """
    advantages = []
    for group, reward_G in enumerate(rewards):
        reward_G = np.asarray(reward_G, dtype=np.float64)
        assert reward_G.ndim == 1, reward_G.shape
        if not np.isfinite(reward_G).all():
            raise ValueError(f"rewards of group {group} are not finite")
        advantages.append(sample_advantages(reward_G[None], normalize)[0] if len(reward_G) else reward_G)
    return advantages


def clipped_token_loss(
    nll_T: Tensor,
    old_nll_T: Tensor,
    reference_nll_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl: float,
) -> tuple[Tensor, Tensor]:
    """The loss of GRPO over tokens, a weighted sum.

        sum_t weight_t (-min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t) + kl k3_t)
        ratio = pi / pi_old = exp(old_nll - nll)
        k3 = exp(d) - d - 1,     d = log pi_ref - log pi = nll - reference_nll

    k3 estimates KL(pi || pi_ref) from the sampled tokens, is never negative, and where they are drawn from pi its
    expectation is the KL (J. Schulman, "Approximating KL Divergence"). Exponentials of more than 20 nats go on
    linearly: their value is no longer the formula's, the sign of the gradient is, and both are finite.

    Args:
        nll_T: negative log-likelihoods under the weights that are trained, the only argument with a gradient.
        old_nll_T: under the weights that the completions were drawn with.
        reference_nll_T: under the frozen weights; None only with kl = 0.
        advantage_T: of the completion that a token belongs to.
        weight_T: >= 0, final: nothing is divided here.

    Returns:
        The loss, scalar in the dtype of `nll_T`; and without a gradient, [3] float64: the weighted sum of the policy's
        part of the loss, that of k3 (0 without a reference; not multiplied by `kl`), and the number of tokens with a
        weight where the clip is active, so that the policy's part has no gradient.
    """
    assert nll_T.ndim == 1, nll_T.shape
    old_nll_T, advantage_T, weight_T = (each.detach().to(nll_T) for each in (old_nll_T, advantage_T, weight_T))
    assert old_nll_T.shape == advantage_T.shape == weight_T.shape == nll_T.shape
    assert kl == 0 or reference_nll_T is not None, "a KL term needs the reference's likelihoods"

    ratio_T = 1.0 + _expm1(old_nll_T - nll_T)
    low, high = 1.0 - clip_low, 1.0 + clip_high
    clipped_T = ((advantage_T > 0) & (ratio_T > high)) | ((advantage_T < 0) & (ratio_T < low))
    policy_T = -advantage_T * torch.where(clipped_T, ratio_T.detach().clamp(low, high), ratio_T)
    if reference_nll_T is None:
        k3_T = torch.zeros_like(nll_T)
    else:
        assert reference_nll_T.shape == nll_T.shape
        difference_T = nll_T - reference_nll_T.detach().to(nll_T)
        k3_T = _expm1(difference_T) - difference_T
    loss = (weight_T * (policy_T + kl * k3_T)).sum()

    with torch.no_grad():
        weight_T = weight_T.double()
        sums = [(weight_T * policy_T).sum(), (weight_T * k3_T).sum(), (clipped_T & (weight_T > 0)).sum().double()]
    return loss, torch.stack(sums)


def _expm1(exponent_T: Tensor) -> Tensor:
    """exp(x) - 1 up to `LINEAR_FROM`, its tangent there beyond."""
    beyond_T = (exponent_T - LINEAR_FROM).clamp(min=0)
    return torch.expm1(exponent_T.clamp(max=LINEAR_FROM)) + float(np.exp(LINEAR_FROM)) * beyond_T
