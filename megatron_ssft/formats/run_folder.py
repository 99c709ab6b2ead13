"""Names in a run folder, and the choice of the checkpoint that counts."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import write_durably

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "train_state.json"
"""In a checkpoint's folder, written last: a checkpoint without it is not complete."""
ASSETS = "hf"
"""In a run: the Hugging Face files besides weights. In a checkpoint: its export."""
CONFIG = "config.yaml"
"""The configuration of the newest start."""
CONFIGS = "configs"
"""Those of all starts, numbered."""
POLICY = "policy.jsonl"
FINISHED = "finished.json"


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration stands."""
    return run / f"iter_{iteration:07d}"


def complete_checkpoints(run: Path) -> list[int]:
    """Iterations of the complete checkpoints of a folder, ascending; none if it is not there."""
    return sorted(
        int(match[1])
        for folder in (run.iterdir() if run.is_dir() else ())
        if (match := re.fullmatch(r"iter_(\d{7,})", folder.name)) and (folder / STATE).is_file()
    )


def latest_checkpoint(run: Path) -> int | None:
    """Iteration of the newest complete checkpoint of a run folder; None without any.

    The tracker file is believed if it names a checkpoint that is there; a torn or stale one is passed over for the
    newest complete folder.
    """
    complete = complete_checkpoints(run)
    if not complete:
        return None
    tracker = run / TRACKER
    text = tracker.read_bytes().strip() if tracker.is_file() else b""
    return int(text) if text.isdigit() and int(text) in complete else complete[-1]


def store_config(run: Path, iteration: int, text: str) -> None:
    """Write the configuration of a start at a step; those of earlier starts stay. Raises OSError."""
    folder = run / CONFIGS
    folder.mkdir(exist_ok=True)
    number = max((number for number, _, _ in _stored_configs(run)), default=0) + 1
    write_durably(folder / f"{number:04d}_from_step_{iteration:07d}.yaml", text)
    write_durably(run / CONFIG, text)


def config_before(run: Path, iteration: int) -> Path | None:
    """The configuration of the start that trained a step; None where the folder has none.

    A start at that step, or a later one, did not.
    """
    earlier = [path for _, step, path in _stored_configs(run) if step < iteration]
    if earlier:
        return earlier[-1]
    return run / CONFIG if (run / CONFIG).is_file() else None


def _stored_configs(run: Path) -> list[tuple[int, int, Path]]:
    """(number, step, file) of every start, ascending."""
    folder = run / CONFIGS
    return sorted(
        (int(match[1]), int(match[2]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"(\d{4,9})_from_step_(\d{7,12})\.yaml", path.name))
    )


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
    if not run.is_dir():
        raise UserError(f"--load {run}: no such folder")
    iteration = latest_checkpoint(run)
    if iteration is None:
        raise UserError(f"--load {run}: holds no checkpoint (iter_*); drop --load to start afresh")
    return iteration
