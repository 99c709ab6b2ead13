"""Seeded draws, pinned: a value that changes here changes runs, data sets and demo figures made before."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.data.sampler import epoch_permutation
from megatron_ssft.datasets.held_out import is_held_out
from megatron_ssft.evaluation.metrics import question_halves
from megatron_ssft.generation.requests import sample_seed
from megatron_ssft.matching.collapse import CollapseWatch
from megatron_ssft.objectives.policy import draws
from megatron_ssft.seeded import (
    generator,
    json_digest,
    permutation,
    raw_generator,
    text_digest,
    two_words,
    whole_number,
)


def test_orders_of_the_data_and_of_policy_learning():
    assert epoch_permutation(10, 7, 2).tolist() == [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]
    assert epoch_permutation(6, -1, 0).tolist() == [0, 4, 2, 3, 1, 5]
    assert draws.permutation(8, 5, "questions", 1).tolist() == [3, 1, 2, 4, 0, 6, 7, 5]
    assert draws.nth_batch(10, 4, 3, 5, "questions") == [1, 2, 4, 0]
    assert draws.first_draws(9, 4, 5, "x") == [6, 1, 5, 7]
    assert draws.generator(5, "tags", 0, "q1").integers(0, 1000, 5).tolist() == [381, 372, 337, 887, 94]


def test_choices_by_question():
    assert sample_seed(7, "q\ud800", None, 3) == 421405078 and sample_seed(7, "q1", 2, 0) == 191727312
    assert [n for n in map(str, range(40)) if is_held_out(n, 0.2, 3)] == ["0", "14", "21", "37", "39"]
    halves = question_halves(["a", "b\ud800", "c", "d", "e", "f"])
    assert halves.tolist() == [False, True, False, False, True, True]


def test_draws_of_the_collapse_watch():
    watch = CollapseWatch(4, mode="optimal", seed=9)
    drawn = watch._information._random_tags(3, [2, 3])
    assert drawn[:2].tolist() == [[0, 3, 2, 3, 1], [1, 0, 1, 3, 2]]


def test_draws_of_a_matching():
    seed = whole_number(text_digest(1234, 0, "q1", algorithm="blake2b", size=16), bits=128)
    assert seed == 272149511309743437098646299130041713378
    assert permutation(raw_generator(seed), 8).tolist() == [6, 4, 1, 2, 5, 3, 0, 7]
    odd = text_digest(-3, 2, "Fr\ud800", algorithm="blake2b", size=16, errors="surrogatepass")
    assert whole_number(odd, bits=128) == 250122428493157058227816873180285097247
    assert whole_number(text_digest(5, 3, algorithm="blake2b", size=8), bits=64) == 12684895429658189769


def test_orders_by_digest():
    assert sorted(range(6), key=lambda j: text_digest(1, j, "q", joined_by="\n")) == [3, 5, 2, 1, 4, 0]
    assert "".join(sorted("abcd", key=lambda c: text_digest(1, "q", c, joined_by="\n"))) == "bdca"
    assert json_digest(1, "q", "trace", "x", None).hex().startswith("ebdf60015d8fbaba")
    with pytest.raises(UnicodeEncodeError):
        text_digest("\ud800")


def test_beginnings_of_numbers():
    digest = text_digest(3, "w", 1)
    assert whole_number(digest, bits=63, byteorder="big") == int.from_bytes(digest[:8], "big") >> 1
    assert int.from_bytes(digest[:8], "little") >> 1 == 3944082254424154724
    assert whole_number(digest, bits=63, byteorder="little") == 3944082254424154724
    assert whole_number(digest, bits=31) == int.from_bytes(digest[:4], "big") >> 1


def test_keys_count_modulo_their_size():
    assert two_words(-1, 0) == 2**64 - 1 and two_words(2**64 + 5, -2) == 5 | (2**64 - 2) << 64
    assert raw_generator(2**128 + 3).random_raw() == raw_generator(3).random_raw()
    assert permutation(raw_generator(0), 6).tolist() == [0, 2, 1, 5, 4, 3]
    assert permutation(raw_generator(0), 6).dtype == np.int64
    assert generator(text_digest("a")).random() != generator(text_digest("b")).random()
