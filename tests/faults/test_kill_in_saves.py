"""SIGKILL inside saves in the background, and anywhere while old checkpoints make room: nothing is lost."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from megatron_ssft.formats.checkpoint_damage import outer_damage, sound_checkpoint
from megatron_ssft.formats.manifest import find_wrong_content, read_manifest
from megatron_ssft.formats.run_folder import TRACKER, all_checkpoints, checkpoint_folder
from tests.faults.test_kill_at_file_operations import kill_and_repeat, tell_kills
from tests.helpers.campaigns import cases, tell
from tests.helpers.captured import run_captured
from tests.helpers.distributed import run_ranks
from tests.helpers.fault_points import CHANGES, WRITES, command_main, run_slowly_with_fault, run_with_fault
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

pytestmark = pytest.mark.slow

ASYNC = cases(whole=25, part=2)
"""Kills of each parallel layout."""
KEEP = cases(whole=20, part=2)
RUN = BASE | {"train_iters": 8, "save_interval": 2, "global_batch_size": 8}
LAYOUTS = {
    "one process": (1, {}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"data_path": write_rows(folder / "train.jsonl", make_rows(16)), "data_cache_path": str(folder / "cache")}


def of_saves(done):
    """Numbers of the operations from the first of a save to its last; of ranks other than the first, those they do."""
    of_save = [number for number, name in enumerate(done) if any(word in name for word in (".iter_", "__", "latest"))]
    return [number for number in range(len(done)) if of_save and of_save[0] < number <= of_save[-1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_inside_a_save_in_the_background(data, tmp_path, layout):
    """While its files are written and training is ahead of it, while it is published, between two of them."""
    ranks, overrides = LAYOUTS[layout]

    def words_of(run, resumes):
        values = RUN | data | overrides | {"save": run, "async_save": True}
        return flags(values | ({"load": run} if resumes else {}))

    outcome = kill_and_repeat(
        tmp_path, "train", ranks, words_of, logs, layout, count=ASYNC, body=run_slowly_with_fault, among=of_saves
    )
    tell_kills("asynchronous saves", ranks, outcome)


def run_and_look(words, run):
    """Run to the end, and look at what a kill would leave before each file operation after the first checkpoint.

    Returns (status, stderr, operations looked at, those at which no good checkpoint was there, most that were there).
    """
    seen, bad, most, looking = [], [], [0], threading.local()
    first = Path(run) / TRACKER

    def look(event, arguments):
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        path = arguments[0] if event in CHANGES or is_write else None
        if not isinstance(path, str | bytes | os.PathLike) or getattr(looking, "now", False) or not watching:
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(run) or not first.exists():
            return
        looking.now = True
        try:
            good = good_checkpoints(Path(run))
        finally:
            looking.now = False
        seen.append(f"{event} {Path(os.fsdecode(path)).name}")
        most[0] = max(most[0], len(good))
        if not good:
            bad.append(seen[-1])

    watching = True
    sys.addaudithook(look)
    try:
        status, _, err = run_captured(command_main("train", words))
    finally:
        watching = False
    return status, err, seen, bad, most[0]


def good_checkpoints(run):
    """Those that a start would take, their content compared with the manifest."""
    good = []
    for iteration in all_checkpoints(run):
        folder = checkpoint_folder(run, iteration)
        if outer_damage(folder, lambda text: None) is None:
            manifest = read_manifest(folder)
            if find_wrong_content(folder, manifest, manifest.files) is None:
                good.append(iteration)
    return good


@pytest.mark.parametrize("more", [{}, {"async_save": True}], ids=["in turn", "in the background"])
def test_at_every_file_operation_a_good_checkpoint_is_there(data, tmp_path, more):
    run = tmp_path / "run"
    words = flags(RUN | data | {"save": run, "keep_last": 2} | more)
    ((status, err, seen, bad, most),) = run_ranks(1, run_and_look, words, str(run), timeout=240)
    assert status == 0, err
    assert bad == [] and most == 3  # the new one is there before an old one goes
    assert sum("removed.partial" in name or "os.rename iter_" in name for name in seen) >= 2
    assert all_checkpoints(run) == [6, 8] and len(seen) > 100
    tell(
        f"file operations with --keep-last 2{', --async-save' if more else ''}", len(seen), "a good checkpoint at each"
    )


@pytest.mark.parametrize("more", [{}, {"async_save": True}], ids=["in turn", "in the background"])
def test_killed_while_old_checkpoints_make_room(data, tmp_path, more):
    """At file operations drawn from the first complete checkpoint on to the end of the run."""
    looked_at = []

    def words_of(run, resumes):
        return flags(RUN | data | {"save": run, "keep_last": 2} | more | ({"load": run} if resumes else {}))

    def after_the_first(done):
        first = next(number for number, name in enumerate(done) if name.startswith("os.rename latest"))
        return range(first + 1, len(done))

    def between(run, where):
        """The newest checkpoint that counts is whole, byte for byte, and no other process has cleared up meanwhile."""
        told = []
        sound_checkpoint(run, by_content=True, may_pass_over=False, say=told.append)
        assert told == [], where
        looked_at.append(where)

    count, killed = kill_and_repeat(
        tmp_path, "train", 1, words_of, logs, str(more), count=KEEP, body=run_with_fault, among=after_the_first,
        between=between,
    )  # fmt: skip
    assert len(looked_at) == count
    tell(f"kills with --keep-last 2{', --async-save' if more else ''}", count, f"{killed} came in time, none was left "
         "without a good checkpoint, all ended the same")  # fmt: skip
