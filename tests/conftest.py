"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.backends.cuda.is_built():  # the tests are for the CPU, also where the machine has a GPU
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Before the first test imports them: their asserts tell values, like those of a test file.
pytest.register_assert_rewrite("tests.helpers")
