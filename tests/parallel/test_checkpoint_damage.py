"""Checkpoints are complete or absent whenever a run dies, and damage is refused in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ssft.formats.run_folder import find_latest
from megatron_ssft.parallel.checkpoint import run_checkpoint as checkpoint
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from tests.helpers.checkpoints import (
    build,
    files,
    load,
    load_and_save_at,
    same_state,
    train_and_save,
    try_to_load,
)
from tests.helpers.distributed import RankFailure, run_ranks

# -- killed while saving ---------------------------------------------------------------------------------------------


def die_while_saving(values, run, moment):
    """Train two steps more and save; the process ends like a killed one at the named moment."""
    trainer = build(values)
    trainer.train_step()
    trainer.train_step()
    real_rename, real_rmtree = os.rename, shutil.rmtree

    def rename(source, target):
        is_checkpoint = Path(target).name == "iter_0000004"
        os._exit(9) if is_checkpoint and moment == "before rename" else real_rename(source, target)
        os._exit(9) if is_checkpoint and moment == "after rename" else None

    def rmtree(folder, **kwargs):
        """Removes half of the files that stand in a folder, never our own state."""
        names = sorted({path.name for path in Path(folder).glob("*")} - {"train_state.json"})
        for name in names[: len(names) // 2]:
            (Path(folder) / name).unlink()
        os._exit(9) if names else real_rmtree(folder, **kwargs)

    if moment in ("before rename", "after rename"):
        os.rename = rename
    elif moment == "while removing":
        shutil.rmtree = rmtree
    elif moment == "while writing":
        checkpoint.seal = lambda folder, written: os._exit(9)
    save_checkpoint(trainer.engine, Path(run), trainer.iteration, trainer.state())


@pytest.mark.parametrize(
    ("moment", "latest"), [("while writing", 2), ("before rename", 2), ("after rename", 4), ("while removing", 4)]
)
def test_killed_while_saving(saved, values, tmp_path, moment, latest):
    """A checkpoint that was complete stays so; the next run overwrites what was left behind."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    again = values | {"load": str(run)}
    if moment == "while removing":  # the run goes back to step 2 and comes to step 4 once more
        run_ranks(1, load_and_save_at, again, str(run), 4)
        (run / checkpoint.TRACKER).write_text("2")
    before = files(run / "iter_0000002")
    with pytest.raises(RankFailure, match="exit code 9"):
        run_ranks(1, die_while_saving, again, str(run), moment)
    assert files(run / "iter_0000002") == before
    found = find_latest(run)
    assert found in (latest, 2)
    (run / checkpoint.TRACKER).unlink()  # the newest folder is complete even where nothing vouches for it
    state = run_ranks(1, load, again)
    assert state[0]["iteration"] >= latest
    if state[0]["iteration"] == 2:
        same_state(saved[1], state)
    expected = run_ranks(1, load_and_save_at, values | {"load": str(saved[0])}, str(tmp_path / "other"), 4)
    same_state(expected, run_ranks(1, load_and_save_at, again, str(run), 4))
    assert find_latest(run) == 4
    same_state(expected, run_ranks(1, load, again))


def test_disk_full_leaves_the_older_checkpoint(saved, values, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    before = files(run)
    with pytest.raises(RankFailure, match="the disk is full"):
        run_ranks(1, save_on_a_full_disk, values | {"load": str(run)}, str(run))
    assert {path: text for path, text in files(run).items() if "partial" not in str(path)} == before
    assert find_latest(run) == 2


def save_on_a_full_disk(values, run):
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = build(values)
    trainer.train_step()
    torch.save, real = fail, torch.save
    FileSystemWriterAsync.write_preloaded_data = staticmethod(fail)
    try:
        save_checkpoint(trainer.engine, Path(run), 3, trainer.state())
    finally:
        torch.save = real


# -- damage ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "shard cut": ("__0_0.distcp", lambda content: content[: len(content) // 2]),
    "shard empty": ("__0_0.distcp", lambda content: b""),
    "shard of zeros": ("__0_0.distcp", lambda content: bytes(len(content))),
    "shard missing": ("__0_0.distcp", None),
    "common.pt cut": ("common.pt", lambda content: content[: len(content) // 2]),
    "common.pt empty": ("common.pt", lambda content: b""),
    "common.pt missing": ("common.pt", None),
    "metadata.json cut": ("metadata.json", lambda content: content[:3]),
    "metadata.json empty": ("metadata.json", lambda content: b""),
    "metadata.json missing": ("metadata.json", None),
    ".metadata cut": (".metadata", lambda content: content[: len(content) // 2]),
    ".metadata empty": (".metadata", lambda content: b""),
    ".metadata missing": (".metadata", None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused_in_one_line(copy, values, name):
    file, change = DAMAGE[name]
    path = copy / "iter_0000002" / file
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    error = run_ranks(1, try_to_load, values | {"load": str(copy)})[0]
    assert error is not None and str(copy / "iter_0000002") in error and "\n" not in error


def test_damage_seen_by_one_rank_ends_both(values, tmp_path):
    """The shard of one rank is cut: every rank ends with the same line, and none waits for another."""
    two = values | {"tensor_model_parallel_size": 2}
    run_ranks(2, train_and_save, two, str(tmp_path), 1)
    path = tmp_path / "iter_0000001" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:100])
    errors = run_ranks(2, try_to_load, two | {"load": str(tmp_path)}, timeout=60)
    assert None not in errors and len(set(errors)) == 1
