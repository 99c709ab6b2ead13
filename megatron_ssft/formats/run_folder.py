"""Names in a run folder, and the choice of the checkpoint that counts."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_ssft.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "train_state.json"
"""In a checkpoint's folder, written last: a checkpoint without it is not complete."""
ASSETS = "hf"
"""In a run: the Hugging Face files besides weights. In a checkpoint: its export."""
POLICY = "policy.jsonl"
FINISHED = "finished.json"
REMOVE_ADVICE = "remove this checkpoint to load an older one"
"""How a message about a damaged checkpoint ends."""
_NO_CHECKPOINT = "holds no checkpoint (iter_*); drop --load to start afresh"


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration stands."""
    return run / f"iter_{iteration:07d}"


def complete_checkpoints(run: Path) -> list[int]:
    """Iterations of the complete checkpoints of a folder, ascending; none if it is not there."""
    return [i for i in _checkpoints(run) if (checkpoint_folder(run, i) / STATE).is_file()]


def _checkpoints(run: Path) -> list[int]:
    """Iterations of all folders that are named as checkpoints, ascending."""
    return sorted(
        int(match[1])
        for folder in (run.iterdir() if run.is_dir() else ())
        if (match := re.fullmatch(r"iter_(\d{7,18})", folder.name)) and folder.is_dir()
    )


def latest_checkpoint(run: Path) -> int | None:
    """Iteration of the newest complete checkpoint of a run folder; None without any.

    The tracker file is believed if it names a checkpoint that is there; a torn or stale one is passed over for the
    newest complete folder.
    """
    return _newest(run, complete_checkpoints(run))


def checkpoints_from_newest(run: Path) -> list[int]:
    """Iterations of all checkpoints, damaged ones too, from the newest to the oldest. Raises UserError if none.

    The newest is the one that the tracker names; later ones, which a run that went back left behind, do not count.
    """
    _refuse_missing(run)
    present = _checkpoints(run)
    newest = _newest(run, present)
    if newest is None:
        raise UserError(f"--load {run}: {_NO_CHECKPOINT}")
    return [i for i in reversed(present) if i <= newest]


def _newest(run: Path, present: list[int]) -> int | None:
    """The one of these that the tracker names, else the last."""
    if not present:
        return None
    tracker = run / TRACKER
    text = tracker.read_bytes().strip() if tracker.is_file() else b""
    named = int(text) if re.fullmatch(rb"\d{1,18}", text) else None
    return named if named in present else present[-1]


def clear_leftovers(run: Path) -> None:
    """Remove what a killed job left behind: parts of files and checkpoints. Raises OSError.

    Only for whoever holds the folder's lease. A checkpoint that made way for another, which then did not get its name,
    comes back.
    """
    for old in run.glob(".iter_*.old"):
        place = run / old.name.removeprefix(".").removesuffix(".old")
        if not place.exists():
            os.rename(old, place)
    for pattern in (".iter_*.partial", ".iter_*.old", "*.tmp", ".*.tmp"):
        for path in run.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def find_latest(run: Path) -> int:
    """Iteration of the newest complete checkpoint. Raises UserError if there is none."""
    _refuse_missing(run)
    iteration = latest_checkpoint(run)
    if iteration is None:
        raise UserError(f"--load {run}: {_NO_CHECKPOINT}")
    return iteration


def _refuse_missing(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"--load {run}: no such folder")
