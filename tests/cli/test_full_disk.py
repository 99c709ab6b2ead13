"""A full disk is said as such, wherever it is met, and what was saved before stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import reason_of
from megatron_ssft.formats.run_folder import find_latest
from tests.helpers.paths import ROOT
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT"])
def test_the_reason_says_what_to_do(name):
    import errno

    number = getattr(errno, name)
    assert "make room" in reason_of(OSError(number, os.strerror(number)))
    assert reason_of(OSError(errno.EACCES, "Permission denied")) == "Permission denied"
    assert reason_of(OSError("odd")) == "odd"


def test_a_line_that_finds_no_room_is_no_traceback(capsys):
    def write():
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("a line")
            file.flush()

    assert run_command(write) == 2
    assert (
        capsys.readouterr().err.strip().endswith("cannot be written: the disk is full; make room on it and start again")
    )
    with pytest.raises(FileNotFoundError):  # anything else is a bug, or somebody else's to say
        run_command(lambda: Path("/no/such/file").unlink())


IN_A_SMALL_DISK = (
    'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && "$@"; status=$?; cp -a "$DISK/." "$KEEP"; exit $status'
)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [64, 700, 1400])
def test_a_run_on_a_disk_that_fills_up(tmp_path, kilobytes):
    """A checkpoint takes some 600 kilobytes: none, one or two find room."""
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    keep.mkdir()
    data = {"data_path": write_rows(tmp_path / "train.jsonl", make_rows()), "data_cache_path": str(tmp_path / "cache")}
    run = disk / "run"
    words = flags(BASE | data | {"save": run, "save_interval": 1, "tensorboard_dir": tmp_path / "board"})
    probe = (
        subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if probe is None or probe.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    result = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", IN_A_SMALL_DISK, "sh", f"{kilobytes}k", str(disk)]
        + [sys.executable, "pretrain_ssft.py", *words],
        cwd=ROOT,
        env=os.environ | {"DISK": str(disk), "KEEP": str(keep), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "the disk is full" in result.stderr.strip().splitlines()[-1]
    assert not list((keep / "run").glob(".iter_*"))
    if kilobytes == 1400:
        assert find_latest(keep / "run") >= 1
