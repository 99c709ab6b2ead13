"""Which questions and completions a step takes: pure functions of seed and step, so there is nothing to store."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *what: object) -> np.random.Generator:
    """A generator for one purpose: different purposes, and different seeds, are independent."""
    return np.random.default_rng(np.frombuffer(_key(seed, what), dtype=np.uint32))


def permutation(count: int, seed: int, *what: object) -> np.ndarray:
    """A random order of `count` items for one purpose, int64 [count].

    It sorts the raw output of a counter-based generator: NumPy promises the raw streams, but not its own shuffle, to
    be the same in every release, and a resumed run must find the same order.
    """
    draws = np.random.Philox(key=np.frombuffer(_key(seed, what)[:16], dtype=np.uint64))
    return np.argsort(draws.random_raw(count), kind="stable").astype(np.int64)


def nth_batch(count: int, size: int, number: int, seed: int, what: str) -> list[int]:
    """Batch `number` (from 0) of `size` out of `count` items: one permutation an epoch, cut without regard to epochs.

    All items, in order, where there are no more than `size`.
    """
    if size >= count:
        return list(range(count))
    places = range(number * size, (number + 1) * size)
    order = {epoch: permutation(count, seed, what, epoch) for epoch in {place // count for place in places}}
    return [int(order[place // count][place % count]) for place in places]


def first_draws(count: int, number: int, seed: int, what: str) -> list[int]:
    """`number` different items out of `count`, all where there are no more, in random order."""
    return permutation(count, seed, what)[:number].tolist()


def _key(seed: int, what: tuple[object, ...]) -> bytes:
    """32 bytes."""
    return hashlib.sha256("\0".join(map(str, (seed, *what))).encode()).digest()
