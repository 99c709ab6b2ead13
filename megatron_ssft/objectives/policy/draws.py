"""Which questions and completions a step takes: pure functions of seed and step, so there is nothing to store."""

from __future__ import annotations

import numpy as np

from megatron_ssft import seeded


def generator(seed: int, *what: object) -> np.random.Generator:
    """A generator for one purpose: different purposes, and different seeds, are independent."""
    return seeded.generator(_key(seed, what))


def permutation(count: int, seed: int, *what: object) -> np.ndarray:
    """A random order of `count` items for one purpose, int64 [count]."""
    key = seeded.whole_number(_key(seed, what), bits=128, byteorder="little")
    return seeded.permutation(seeded.raw_generator(key), count)


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
    return seeded.text_digest(seed, *what, joined_by="\0")
