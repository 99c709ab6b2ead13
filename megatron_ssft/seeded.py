"""Seeded draws: every random choice of the package is a pure function of a seed and of what is chosen.

So nothing has to be stored, and a resumed run finds the same choices. Three steps, each in one function:

    digest of the seed and the names of the choice   ->  a number or a generator's key  ->  a draw

The digests differ by purpose (`joined_by`, `algorithm`): changing one changes the runs and data sets made with it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np

WORD = 2**64
"""A Philox key has two words."""


def text_digest(
    *parts: object,
    joined_by: str = "/",
    algorithm: Literal["sha256", "blake2b"] = "sha256",
    size: int = 32,
    errors: Literal["strict", "surrogatepass", "backslashreplace"] = "strict",
) -> bytes:
    """Hash the parts as one text. Also a fair order: sort things by their digests.

    Args:
        joined_by: must not occur in the parts, else two choices could share a draw.
        size: bytes; sha256 has 32 always.
        errors: what to do with halves of surrogate pairs, as in `str.encode`.
    """
    data = joined_by.join(map(str, parts)).encode("utf-8", errors)
    if algorithm == "blake2b":
        return hashlib.blake2b(data, digest_size=size).digest()
    return hashlib.sha256(data).digest()


def json_digest(*parts: object) -> bytes:
    """sha256 of the parts as a JSON list: it keeps them apart and spells halves of surrogate pairs."""
    return hashlib.sha256(json.dumps(parts).encode("ascii")).digest()


def whole_number(digest: bytes, *, bits: int, byteorder: Literal["big", "little"] = "big") -> int:
    """A number in [0, 2^bits) from the beginning of a digest."""
    length = -(-bits // 8)
    return int.from_bytes(digest[:length], byteorder) >> (8 * length - bits)


def two_words(low: int, high: int) -> int:
    """The key of a raw generator for a seed and a place (an epoch, a step); of any sign and size."""
    return (low % WORD) | (high % WORD) << 64


def raw_generator(key: int) -> np.random.Philox:
    """A counter-based generator; `key` counts modulo 2^128.

    NumPy promises its raw stream, but not the draws of `Generator`, to be the same in every release.
    """
    return np.random.Philox(key=key % WORD**2)


def permutation(draws: np.random.Philox, size: int) -> np.ndarray:
    """A random order of `size` items, int64: sorted raw output, the same in every release of NumPy."""
    return np.argsort(draws.random_raw(size), kind="stable").astype(np.int64)


def generator(digest: bytes) -> np.random.Generator:
    """NumPy's default generator for one purpose."""
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
