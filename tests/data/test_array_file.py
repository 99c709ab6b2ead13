"""Tokenized data read piece by piece: what numpy would read, and an error instead of a bus error where it was cut."""

from __future__ import annotations

import os

import numpy as np
import pytest

from megatron_ssft.config import DataConfig
from megatron_ssft.data.array_file import ArrayFile
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.errors import UserError
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.training_runs import make_rows, write_rows


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_pieces_are_those_of_the_array(tmp_path, dtype):
    expected = np.random.default_rng(0).integers(0, 1000, 5000).astype(dtype)
    np.save(tmp_path / "a.npy", expected)
    file = ArrayFile(tmp_path / "a.npy", np.dtype(dtype))
    assert len(file) == 5000
    for first, end in ((0, 5000), (0, 0), (17, 18), (4999, 5000), (123, 4567)):
        np.testing.assert_array_equal(file.read(first, end), expected[first:end])
    with pytest.raises(ValueError):
        file.read_all()[0] = 1


def test_another_type_or_shape_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.int32))
    with pytest.raises(ValueError):
        ArrayFile(tmp_path / "a.npy", np.dtype(np.int32))
    np.save(tmp_path / "a.npy", np.zeros(4, np.int64))
    with pytest.raises(ValueError):
        ArrayFile(tmp_path / "a.npy", np.dtype(np.int32))


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "set_starts.npy"])
def test_data_that_is_cut_while_in_use_is_one_line(tmp_path, name):
    """Mapped memory would end the process without a word."""
    tokenizer = build_tokenizer("CharTokenizer", None)
    paths = [write_rows(tmp_path / "train.jsonl", make_rows(400, 5))]
    tags = build_forking_tokens(tokenizer, 5, "special", None)
    folder = build_dataset(
        paths, tokenizer, tags, DataConfig(paths), 64, check_num_tags=True, seed=1, cache_dir=tmp_path / "cache"
    )
    dataset = SetDataset.open(folder)
    before = [dataset[i].completion_ids for i in range(400)]
    os.truncate(folder / name, 160)
    with pytest.raises(UserError, match=rf"{name}: was cut while it was in use, \d+ bytes are missing"):
        dataset[399]
    os.unlink(folder / name)
    rebuilt = SetDataset.open(
        build_dataset(
            paths, tokenizer, tags, DataConfig(paths), 64, check_num_tags=True, seed=1, cache_dir=tmp_path / "cache"
        )
    )
    for expected, item in zip(before, rebuilt):
        for a, b in zip(expected, item.completion_ids, strict=True):
            np.testing.assert_array_equal(a, b)
