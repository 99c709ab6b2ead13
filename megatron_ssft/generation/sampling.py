"""Drawing tokens so that a row's draw depends on its own logits, seed and step, and on nothing else in the batch.

Uniform numbers come from a counter (seed, step) instead of a generator's state. The token is found by inverting the
cumulative distribution in the order of the vocabulary: sorting is used only to find which probability is the least one
kept, so equal values may come out of it in any order.
"""

from __future__ import annotations

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_CANDIDATES = 256


def uniforms(seeds: np.ndarray, step: int) -> np.ndarray:
    """Draw float64 [B] in [0, 1), one for each of the uint64 `seeds` [B], for token number `step` (SplitMix64)."""
    jump = np.uint64((step + 1) * int(_GAMMA) % 2**64)
    return (_mix(_mix(seeds + _GAMMA) + jump) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pick(
    logits: torch.Tensor, uniform: np.ndarray, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """Pick a token, int64 [B], for each row of `logits` [B, V].

    Temperature 0 picks the most probable one, the first of equals. Else, as elsewhere: temperature first, then the
    `top_k` most probable tokens (0: all), then of those the fewest most probable ones whose share reaches `top_p`.
    Tokens as probable as the last one kept are kept too.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Of the largest logits nothing is left but 1 at temperatures near 0, where the division would overflow.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_k or top_p < 1:
        least = _least_kept(probabilities, top_p, top_k)
        probabilities = probabilities.where(probabilities >= least, 0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = torch.from_numpy(uniform).to(logits.device)[:, None] * cumulative[:, -1:]
    # The first place whose sum exceeds the target has a probability above 0. A target rounded up to the whole sum
    # has no such place; it gets the last token that has a probability.
    token = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(token, last)[:, 0]


def _least_kept(probabilities: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Find the least probability that the limits keep, [B, 1]. Sorts no more than it has to."""
    size = probabilities.shape[-1]
    count = min(size, top_k or _FIRST_CANDIDATES)
    while True:
        # Without --top-k the whole is 1 but for rounding, which differs between the rows of this sum and those of that.
        values = probabilities.topk(count, dim=-1).values.double()
        sums = values.cumsum(dim=-1)
        whole = sums[:, -1:] if top_k else torch.ones_like(sums[:, -1:])
        if top_k or count == size or bool((sums[:, -1:] >= top_p).all()):
            break
        count = min(size, 8 * count)
    before = sums - values
    is_kept = before < top_p * whole  # always the first
    places = is_kept.sum(dim=-1, keepdim=True) - 1
    return values.gather(-1, places).to(probabilities.dtype)
