"""A model larger than memory is one line: how much was wanted, and which flags lower it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from megatron_ssft.cli.main import COMMANDS
from megatron_ssft.cli.memory import _ADVICE, enough_memory
from megatron_ssft.config import GFPOConfig, SSFTConfig
from megatron_ssft.config.flags import fields_of
from megatron_ssft.errors import UserError
from tests.helpers.bad_input import complaint, flags, start_each, write_rows
from tests.helpers.distributed import run_ranks

NUMBERS = 10**14
"""Of 4 bytes: more than a process can address."""


def cpp_alloc():
    raise MemoryError("std::bad_alloc")


def gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of ...")


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        (lambda: torch.empty(NUMBERS), "363.8 TiB"),
        (lambda: np.zeros(NUMBERS, dtype=np.float32), "364. TiB"),
        (lambda: bytearray(4 * NUMBERS), None),
        (cpp_alloc, None),
        (gpu, "20.50 GiB"),
    ],
)
def test_every_librarys_error_is_one_line(work, wanted):
    with pytest.raises(UserError) as caught, enough_memory("train"):
        work()
    line = str(caught.value)
    assert line.startswith("not enough memory") and "\n" not in line
    assert (f" for {wanted} at once; " in line) if wanted else (" for " not in line.partition(";")[0])


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("can't allocate memory")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=str(error)), enough_memory("train"):
        raise error


def test_the_flags_that_are_named_exist():
    assert set(_ADVICE) <= set(COMMANDS)
    for command, config in {"train": SSFTConfig, "gfpo": GFPOConfig}.items():
        named = re.findall(r"--([a-z-]+)", _ADVICE[command])
        assert named and {name.replace("-", "_") for name in named} <= fields_of(config).keys()


def test_a_model_larger_than_memory_is_refused_in_one_line(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    words = flags(tmp_path, hidden_size=10**5, kv_channels=8, ffn_hidden_size=10**7, save=tmp_path / "run")
    line = complaint(run_ranks(1, start_each, [words], timeout=120)[0][0])
    assert re.match(r"not enough memory for [\d.]+ (GiB|TiB) at once; .*--tensor-model-parallel-size", line), line
    assert not list(tmp_path.glob("run/iter_*"))
