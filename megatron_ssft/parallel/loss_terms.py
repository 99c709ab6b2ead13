"""What a step trains on: sequences with their plan, and the loss of what the model says about a microbatch of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from megatron_ssft.records import ForkingTokens, Microbatch, MicrobatchPlan, ModelInput, QuestionBatch

Prepared = tuple[ModelInput, tuple[np.ndarray, ...]]
"""A microbatch as the model takes it, and what else its loss needs, by scored place."""


@dataclass(frozen=True)
class LossTerm:
    """One summand of a step's loss. The engine cuts its microbatches, runs them, and asks for their losses."""

    batch: QuestionBatch
    plan: MicrobatchPlan
    tags: ForkingTokens
    """What stands between a prompt and its completions."""
    prepare: Callable[[Microbatch, ModelInput], Prepared]
    """Adds what the loss needs to a microbatch; the arrays are put on the device before the forward pass."""
    loss: Callable[..., tuple[Tensor, Tensor]]
    """(output of the model, float32 [n] or [n, k] NLL; the arrays as tensors) -> (loss of the microbatch, a scalar;
    float64 figures to report, which add up over microbatches). Weights in it are final: losses are summed."""
    figures: tuple[str, ...] = ()
    """Names of these."""
    options: Mapping[str, object] = field(default_factory=dict)
    """How microbatches are cut, as `build_stream` takes it; by default all completion tokens are scored, and only they,
    each with weight 1."""


def weighted_nll(nll: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum(weight x NLL), and nothing to report."""
    return (nll * weights).sum(), nll.new_empty(0).double()
