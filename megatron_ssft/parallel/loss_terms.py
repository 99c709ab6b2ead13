"""What a step trains on: planned sequences, and the loss of what the model says about a microbatch of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_ssft.records import Microbatch, ModelInput, PlannedBatch

Prepared = tuple[ModelInput, tuple[np.ndarray, ...]]
"""A microbatch as the model takes it, and what else its loss needs, by scored place."""


@dataclass(frozen=True)
class LossTerm:
    """One summand of a step's loss. The engine cuts its microbatches, runs them, and asks for their losses."""

    planned: PlannedBatch
    prepare: Callable[[Microbatch, ModelInput], Prepared]
    """Adds what the loss needs to a microbatch; the arrays are put on the device before the forward pass."""
    loss: Callable[..., tuple[Tensor, Tensor]]
    """(output of the model, float32 [n] or [n, k] NLL; the arrays as tensors) -> (loss of the microbatch, a scalar;
    float64 figures to report, which add up over microbatches). Weights in it are final: losses are summed."""
    figures: tuple[str, ...] = ()
    """Names of these figures."""


def weighted_nll(nll: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum(weight x NLL), and nothing to report."""
    return (nll * weights).sum(), nll.new_empty(0).double()
