"""A disk that gets full at any byte: one line says so, what was saved stays, and with more room the run goes on."""

from __future__ import annotations

import random

import pytest

from tests.helpers.campaigns import cases, tell
from tests.helpers.distributed import run_ranks
from tests.helpers.fault_points import run_with_fault
from tests.helpers.small_disk import is_possible, run_on_small_disks
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

pytestmark = pytest.mark.slow

SIZES = cases(whole=33, part=4)
RUN = BASE | {"train_iters": 4, "save_interval": 2, "global_batch_size": 8, "export_hf_at_save": True}


def test_full_at_any_byte(tmp_path):
    disk, outside = tmp_path / "disk", tmp_path / "outside"
    disk.mkdir()
    outside.mkdir()
    if not is_possible(disk):
        pytest.skip("nobody may mount a tmpfs here")
    data = {"data_path": write_rows(outside / "train.jsonl", make_rows(12)), "data_cache_path": str(outside / "cache")}
    whole, run = outside / "whole", disk / "run"
    status, _, err, _ = run_ranks(1, run_with_fault, "train", flags(RUN | data | {"save": whole}), str(whole))[0]
    assert status == 0, err
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    draw = random.Random(0)
    start = flags(RUN | data | {"save": run})
    task = {
        "command": "train",
        "run": str(run),
        "first": [str(word) for word in start],
        "second": [str(word) for word in [*start, "--load", run]],
        "sizes": [4096, *(draw.randrange(8192, int(0.9 * needed)) for _ in range(SIZES - 1))],
    }
    for size, (status, _, err), (status_again, _, err_again), left, texts in run_on_small_disks(disk, task):
        assert status == 2, (size, status, err)
        (line,) = err.strip().splitlines()
        assert "the disk is full" in line and str(disk) in line, (size, line)
        assert not [name for name in left if "partial" in name or "tmp" in name], (size, left)
        assert status_again == 0 and "Loading weights" not in err_again, (size, err_again)
        for name, text in texts.items():
            (outside / name).write_text(text)
        assert logs(outside) == logs(whole), size
    tell("full disks", SIZES, "one line each, and the run went on with more room")
