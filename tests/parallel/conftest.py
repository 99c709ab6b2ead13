"""Runs whose checkpoints the tests look at."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.checkpoints import train_and_save, values_in
from tests.helpers.distributed import run_ranks


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return values_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(values, tmp_path_factory):
    """(run folder with checkpoints 1 and 2 of one rank, its state at 2)."""
    run = tmp_path_factory.mktemp("saved")
    return run, run_ranks(1, train_and_save, values, str(run), 1, 2)


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of that run, to be damaged, with its older checkpoint taken away."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    shutil.rmtree(run / "iter_0000001")
    return run
