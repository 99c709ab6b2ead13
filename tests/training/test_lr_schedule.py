"""The learning rate of every step, against values computed by hand and the promises of the flags."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_ssft.config import TrainingConfig
from megatron_ssft.training.lr_schedule import learning_rate, warmup_iterations


def rates(train_iters, **settings):
    """The rate of every step of a run whose length does not come from the configuration."""
    training = TrainingConfig(**({"lr": 1.0} | settings))
    return [learning_rate(training, iteration, train_iters) for iteration in range(1, train_iters + 1)]


WARMUP = [0.25, 0.5, 0.75, 1.0]
HALF, SIXTH = math.cos(math.pi / 3), math.cos(math.pi / 6)
BY_HAND = {
    "linear": [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [1.0, (1 + SIXTH) / 2, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, (1 - SIXTH) / 2],
    "constant": [1.0] * 6,
}


@pytest.mark.parametrize("style", BY_HAND)
def test_warmup_and_decay_by_hand(style):
    assert rates(10, lr_decay_style=style, lr_warmup_iters=4) == pytest.approx(WARMUP + BY_HAND[style], rel=1e-12)


@pytest.mark.parametrize(("style", "middle"), [("linear", 2 + 6 * 0.5), ("cosine", 2 + 6 * 0.5)])
def test_decay_runs_from_lr_to_min_lr(style, middle):
    """With 8 steps of decay the fifth stands half way; the one after the last would be at --min-lr."""
    found = rates(8, lr=8.0, min_lr=2.0, lr_decay_style=style)
    assert found[0] == 8.0
    assert found[4] == pytest.approx(middle)


def test_peak_and_floor_scale_with_lr():
    assert rates(10, lr=3e-4, lr_warmup_iters=4) == pytest.approx(
        [3e-4 * rate for rate in WARMUP + BY_HAND["cosine"]], rel=1e-12
    )


WARMUPS = (0, 1, 5, 29, 30, 40)
GRID = [
    *itertools.product(("cosine", "linear"), (0.0, 0.1, 1.0), WARMUPS, (None, 1, 12, 30, 45)),
    *itertools.product(("constant",), (0.0,), WARMUPS, (None,)),  # the floor and the steps of a decay have no use
]  # style, min_lr, warm-up, decay steps


@pytest.mark.parametrize(("style", "min_lr", "warmup", "decay"), GRID)
def test_promises_hold_for_every_combination(style, min_lr, warmup, decay):
    found = rates(30, lr_decay_style=style, min_lr=min_lr, lr_warmup_iters=warmup, lr_decay_iters=decay)
    assert all(math.isfinite(rate) and 0.0 <= rate <= 1.0 for rate in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == pytest.approx([k / warmup for k in range(1, len(rising) + 1)])
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert all(rate >= min_lr for rate in falling)
    if decay is None or decay >= 30 or style == "constant":
        assert all(rate > 0.0 for rate in found)
    if falling and (decay or 30) > warmup:
        assert falling[0] == 1.0


def test_rate_stays_at_min_lr_after_the_decay_steps():
    found = rates(20, min_lr=0.125, lr_decay_iters=12, lr_warmup_iters=2)
    assert found[:12] == rates(12, min_lr=0.125, lr_warmup_iters=2)
    assert min(found[:12]) > 0.125
    assert found[12:] == [0.125] * 8


@pytest.mark.parametrize("style", BY_HAND)
def test_run_of_one_step(style):
    assert rates(1, lr_decay_style=style) == [1.0]
    assert rates(1, lr_decay_style=style, lr_warmup_iters=1) == [1.0]
    assert rates(1, lr_decay_style=style, lr_warmup_iters=4) == [0.25]


@pytest.mark.parametrize("style", BY_HAND)
def test_warmup_as_long_as_the_run_ends_at_the_peak(style):
    assert rates(4, lr_decay_style=style, lr_warmup_iters=4) == WARMUP
    assert rates(4, lr_decay_style=style, lr_warmup_fraction=1.0) == WARMUP


@pytest.mark.parametrize(
    ("settings", "train_iters", "steps"),
    [
        ({}, 100, 0),
        ({"lr_warmup_iters": 7}, 100, 7),
        ({"lr_warmup_fraction": 0.05}, 756, 38),  # the paper's run: 37.8
        ({"lr_warmup_fraction": 0.05}, 256, 13),
        ({"lr_warmup_fraction": 0.0}, 256, 0),
        ({"lr_warmup_fraction": 1.0}, 256, 256),
        ({"lr_warmup_fraction": 0.05, "lr_decay_iters": 100}, 50, 5),
        ({"lr_warmup_iters": 7, "lr_decay_iters": 100}, 50, 7),
    ],
)
def test_length_of_the_warmup(settings, train_iters, steps):
    assert warmup_iterations(TrainingConfig(**settings), train_iters) == steps


def test_rate_does_not_depend_on_what_was_asked_before():
    training = TrainingConfig(train_iters=30, lr=1.0, lr_warmup_iters=3)
    assert learning_rate(training, 17, 30) == rates(30, lr_warmup_iters=3)[16]
