"""The run folder is moved or removed under a running job: one line, and nothing is written where it was."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.bad_input import complaint, flags, start, write_rows
from tests.helpers.distributed import run_ranks


def train_while(words, run, happens, at):
    """Train, and after some steps do something to the run folder; (status, stdout, stderr) of the start."""
    run, moved = Path(run), Path(run).with_name("moved")

    def arm(trainer):
        advance = trainer._advance

        def advance_and_strike(log):
            advance(log)
            if trainer.iteration == at:
                remove(run) if happens == "removed" else run.rename(moved)
                if happens == "replaced":
                    run.mkdir()

        trainer._advance = advance_and_strike

    return start(words, before_run=arm)


def remove(folder):
    """Remove it, although TensorBoard's thread may put a file into it meanwhile."""
    while os.path.exists(folder):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("happens", ["renamed", "removed", "replaced"])
def test_a_run_folder_that_is_gone_ends_the_run(tmp_path, happens, at):
    """Step 1 is before the first checkpoint, 3 between two, 4 just before the last."""
    write_rows(tmp_path / "train.jsonl")
    run = tmp_path / "run"
    words = flags(tmp_path, save=run, save_interval=2, train_iters=4)
    line = complaint(run_ranks(1, train_while, words, str(run), happens, at)[0])
    assert str(run) in line and "moved or deleted" in line
    assert sorted(run.rglob("*")) == [] and run.exists() == (happens == "replaced")
    if happens != "removed":
        kept = sorted(path.name for path in (tmp_path / "moved").glob("iter_*"))
        assert kept == ([] if at == 1 else ["iter_0000002"])
