"""Which questions and completions a step takes: pure functions of seed and step, so there is nothing to store."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *what: object) -> np.random.Generator:
    """A generator for one purpose: different purposes, and different seeds, are independent."""
    text = "\0".join(map(str, (seed, *what))).encode()
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text).digest(), dtype=np.uint32))


def nth_batch(count: int, size: int, number: int, seed: int, what: str) -> list[int]:
    """Batch `number` (from 0) of `size` out of `count` items: one permutation an epoch, cut without regard to epochs.

    All items, in order, where there are no more than `size`.
    """
    if size >= count:
        return list(range(count))
    places = range(number * size, (number + 1) * size)
    epochs = {place // count for place in places}
    order = {epoch: generator(seed, what, epoch).permutation(count) for epoch in epochs}
    return [int(order[place // count][place % count]) for place in places]


def first_draws(count: int, number: int, seed: int, what: str) -> list[int]:
    """`number` different items out of `count`, all where there are no more, in random order."""
    return [int(i) for i in generator(seed, what).permutation(count)[:number]]
