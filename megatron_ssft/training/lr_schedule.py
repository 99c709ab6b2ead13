"""Learning rate as a pure function of the step: nothing to store, nothing to restore.

The tags' own multiple of it is applied in `parallel/optimizer.py`.
"""

from __future__ import annotations

import math

from megatron_ssft.config import TrainingConfig


def warmup_iterations(training: TrainingConfig, train_iters: int) -> int:
    """Steps of linear warm-up: --lr-warmup-iters, or the fraction of the decay steps rounded to a whole step."""
    if training.lr_warmup_fraction is None:
        return training.lr_warmup_iters
    return round(training.lr_warmup_fraction * (training.lr_decay_iters or train_iters))


def learning_rate(training: TrainingConfig, iteration: int, train_iters: int) -> float:
    """Rate of step `iteration` (from 1).

    Warm-up rises linearly to --lr at its last step; the decay reaches --min-lr one step after the last, so that no
    step of the run is spent at rate zero.
    """
    decay_iters = training.lr_decay_iters or train_iters
    warmup = warmup_iterations(training, train_iters)
    if iteration <= warmup:
        return training.lr * iteration / warmup
    if training.lr_decay_style == "constant":
        return training.lr
    if iteration > decay_iters:
        return training.min_lr
    progress = (iteration - 1 - warmup) / (decay_iters - warmup)
    share = 1.0 - progress if training.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.min_lr + (training.lr - training.min_lr) * share
