"""Names in a run folder, and the choice of the checkpoint that counts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import publish_file, remove_parts, sync_folder, write_durably

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "train_state.json"
"""In a checkpoint's folder, written last: a checkpoint without it is not complete."""
ASSETS = "hf"
"""In a run: the Hugging Face files besides weights. In a checkpoint: its export."""
CONFIG = "config.yaml"
"""The configuration of the newest start."""
CONFIGS = "configs"
"""Those of all starts, numbered."""
IMPORTING = ".importing"
"""In a run that is being made by an import."""
IMPORTED = "import.json"
"""In a run that was made by an import: of what, and how."""
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
    return [i for i in all_checkpoints(run) if (checkpoint_folder(run, i) / STATE).is_file()]


def all_checkpoints(run: Path) -> list[int]:
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
    present = all_checkpoints(run)
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
    """Remove what a killed job left behind, in the folder and in its checkpoints. Raises OSError.

    Only for whoever holds the folder's lease. A folder that made way for another, which then did not get its name,
    comes back. An import that did not come to its end goes altogether.
    """
    for folder in (run, *(checkpoint_folder(run, i) for i in all_checkpoints(run))):
        remove_parts(folder)
    if (run / IMPORTING).exists():
        for name in (TRACKER, CONFIG):
            (run / name).unlink(missing_ok=True)
        for folder in (checkpoint_folder(run, 0), run / ASSETS):
            if folder.exists():
                shutil.rmtree(folder)
        sync_folder(run)  # the mark goes last
        (run / IMPORTING).unlink()


def begin_import(run: Path, origin: str) -> None:
    """Mark a folder as filled by an import that is not at its end; nothing loads it. Raises OSError.

    `origin`: JSON text that says what is imported, and how.
    """
    write_durably(run / IMPORTING, origin)


def end_import(run: Path) -> None:
    """Turn the mark into the note of a complete import. Raises OSError."""
    publish_file(run / IMPORTING, run / IMPORTED)


def is_imported(run: Path, origin: str) -> bool:
    """Whether the folder holds the complete import of this origin. Raises OSError."""
    note = run / IMPORTED
    return note.is_file() and note.read_text(encoding="utf-8", errors="replace") == origin


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
    if (run / IMPORTING).exists():
        raise UserError(f"--load {run}: its import did not come to its end; repeat the same import")
