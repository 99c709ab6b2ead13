"""Keep the trained model near the frozen one on stored completions, token by token.

Training the policy at the forking token alone moves weights that the rest of a completion shares, and erodes the modes
that the tags stand for. The anchor penalises this with KL(reference || model) at the completions' tokens. Stored are
the reference's k most likely tokens at each place, so that the frozen weights need not be in memory.

Shapes: T places, k tokens of the vocabulary at each.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1e30
"""Infinite log-probabilities become this many nats, so that nothing times infinity occurs."""


def top_k_kl(nll_Tk: Tensor, reference_logp_Tk: Tensor, weight_T: Tensor, floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """KL(reference || model) over k tokens and one bucket for the rest of the vocabulary.

        KL_t = sum_k p_k (log p_k - log q_k) + (p_rest + floor) log((p_rest + floor) / (q_rest + floor))
        p = exp(reference_logp),   p_rest = max(0, 1 - sum_k p_k),   q = exp(-nll),   q_rest = max(0, 1 - sum_k q_k)

    Never negative, and never more than the KL over the whole vocabulary, both by the log-sum inequality: joining tokens
    into a bucket loses some, and so does the floor, which is one more bucket that both have in equal parts. Where the
    bucket is much smaller than the floor it has next to no part in the value. Rounding can violate both by what it does
    to 1 - sum_k q_k, about 1e-7 in float32.

    Where the model is the reference, the gradient is 0. So that this holds where the tokens cover (nearly) everything,
    the maximum counts in the value of q_rest but not in its derivative: which side of 0 rounding falls on decides
    nothing.

    Args:
        nll_Tk: [T, k] of different tokens at each place, under the weights that are trained; the only one with a
            gradient.
        reference_logp_Tk: [T, k], of the same tokens; -inf for places without a token.
        weight_T: [T], final: nothing is divided here.
        floor: > 0, a probability.

    Returns:
        sum_t weight_t KL_t, scalar in the dtype of `nll_Tk`; and KL_t [T] in nats, unweighted, without a gradient.
    """
    assert nll_Tk.ndim == 2 and reference_logp_Tk.shape == nll_Tk.shape, (nll_Tk.shape, reference_logp_Tk.shape)
    assert weight_T.shape == nll_Tk.shape[:1], weight_T.shape
    assert floor > 0, floor
    # In float64: what is left of 1 after k float32 numbers is otherwise mostly rounding.
    log_q_Tk = -nll_Tk.double().clamp(max=LARGEST)
    log_p_Tk = reference_logp_Tk.detach().to(nll_Tk.device, torch.float64).clamp(min=-LARGEST)
    p_Tk = log_p_Tk.exp()
    p_rest_T = (1.0 - p_Tk.sum(dim=1)).clamp(min=0) + floor
    q_rest_T = 1.0 - log_q_Tk.exp().sum(dim=1)
    q_rest_T = q_rest_T + (q_rest_T.clamp(min=0) - q_rest_T).detach() + floor
    kl_T = (p_Tk * (log_p_Tk - log_q_Tk)).sum(dim=1) + p_rest_T * (p_rest_T.log() - q_rest_T.log())
    loss = (weight_T.detach().to(kl_T) * kl_T).sum()
    return loss.to(nll_Tk.dtype), kl_T.detach().to(nll_Tk.dtype)
