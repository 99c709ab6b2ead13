"""--keep-last and --keep-every: what stays, what goes, and what a kill or a reader in between leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_ssft.formats import read_mark, retention
from megatron_ssft.formats.manifest import seal
from megatron_ssft.formats.read_mark import ReadMarks, reading
from megatron_ssft.formats.retention import Retention
from megatron_ssft.formats.run_folder import all_checkpoints, checkpoint_folder, clear_leftovers
from tests.formats.test_train_state import SSFT


def make_checkpoint(run, iteration):
    folder = checkpoint_folder(run, iteration)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(100))
    (folder / "train_state.json").write_text(json.dumps(SSFT | {"iteration": iteration, "has_manifest": True}))
    seal(folder, {})


def make_run(run, *iterations):
    for iteration in iterations:
        make_checkpoint(run, iteration)
    return run


def damage(run, iteration):
    (checkpoint_folder(run, iteration) / "__0_0.distcp").write_bytes(bytes(99))


@pytest.mark.parametrize(
    ("stored", "newest", "last", "every", "left"),
    [
        ([2, 4, 6, 8], 8, 1, None, [8]),
        ([2, 4, 6, 8], 8, 2, None, [6, 8]),
        ([2, 4, 6, 8], 8, 9, None, [2, 4, 6, 8]),
        ([2, 4, 6, 8, 10], 10, 1, 4, [4, 8, 10]),
        ([2, 4, 6, 8, 10], 10, 2, 6, [6, 8, 10]),
        ([0, 2, 4], 4, 1, None, [0, 4]),  # an import
        ([2, 4, 6, 8], 6, 1, None, [6, 8]),  # 8 was left behind by a run that went back
        ([7], 7, 1, None, [7]),
    ],
)
def test_what_stays(tmp_path, stored, newest, last, every, left):
    run = make_run(tmp_path, *stored)
    removal = Retention(run, last, every).thin(newest)
    assert all_checkpoints(run) == left
    assert sorted(removal.removed) == sorted(set(stored) - set(left)) and removal.problem is None
    assert sorted(os.listdir(run)) == [checkpoint_folder(run, i).name for i in left]


def test_damaged_checkpoints_do_not_count(tmp_path):
    """Two good ones stay; a damaged one among them stays too, for somebody to look at, and goes when they go."""
    run = make_run(tmp_path, 2, 4, 6, 8, 10)
    damage(run, 8)
    Retention(run, 2, None).thin(10)
    assert all_checkpoints(run) == [6, 8, 10]
    make_checkpoint(run, 12)
    Retention(run, 2, None).thin(12)
    assert all_checkpoints(run) == [10, 12]
    damage(run, 10)
    make_checkpoint(run, 14)
    (checkpoint_folder(run, 12) / "train_state.json").unlink()
    Retention(run, 1, None).thin(14)
    assert all_checkpoints(run) == [14]


def test_nothing_goes_where_the_newest_is_damaged(tmp_path):
    run = make_run(tmp_path, 2, 4, 6)
    damage(run, 6)
    removal = Retention(run, 1, None).thin(6)
    assert all_checkpoints(run) == [2, 4, 6] and "iter_0000006" in removal.problem


@pytest.mark.parametrize("operation", ["rmtree", "rename"])
def test_a_removal_that_fails_is_told_and_loses_nothing_else(tmp_path, monkeypatch, operation):
    run = make_run(tmp_path, 2, 4, 6)

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(args[0]))

    monkeypatch.setattr(retention.shutil if operation == "rmtree" else retention.os, operation, fail)
    removal = Retention(run, 1, None).thin(6)
    assert removal.removed == [] and "Permission denied" in removal.problem
    monkeypatch.undo()
    assert 6 in all_checkpoints(run)
    clear_leftovers(run)
    Retention(run, 1, None).thin(6)
    assert sorted(os.listdir(run)) == ["iter_0000006"]


def test_nothing_goes_while_another_job_reads(tmp_path):
    run = make_run(tmp_path, 2, 4, 6)
    keeper = Retention(run, 1, None)
    with reading(run):
        removal = keeper.thin(6)
        assert all_checkpoints(run) == [2, 4, 6] and f"process {os.getpid()} on " in removal.problem
    keeper.thin(6)
    assert sorted(os.listdir(run)) == ["iter_0000006"]


READ_AND_DIE = """
import os, sys
from pathlib import Path
from megatron_ssft.formats.read_mark import reading
with reading(Path(sys.argv[1])):
    os._exit(0)
"""


def test_a_dead_reader_does_not_count(tmp_path):
    subprocess.run([sys.executable, "-c", READ_AND_DIE, str(tmp_path)], check=True)
    assert len(os.listdir(tmp_path)) == 1
    assert ReadMarks(tmp_path).reader() is None and os.listdir(tmp_path) == []


def test_a_silent_reader_of_another_host_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(read_mark.Owner, "runs_here", False)
    with reading(tmp_path):
        patient, hurried = ReadMarks(tmp_path), ReadMarks(tmp_path, silence_seconds=0.0)
        assert patient.reader() is not None and hurried.reader() is not None
        (mark,) = tmp_path.iterdir()
        os.utime(mark, ns=(1, 1))
        assert hurried.reader() is not None  # a sign of life
        assert patient.reader() is not None
        assert hurried.reader() is None and os.listdir(tmp_path) == []
