"""A JSONL log where a run goes on from a checkpoint: only lines behind the checkpoint are dropped.

What cannot be read before it is kept beside the log, in NAME.unreadable. A log that ends before the checkpoint is
refused: its lines are lost somewhere, and whoever started the run should know before hours are trained on top.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import publish_file, sync_file

UNREADABLE = ".unreadable"
"""Follows the name of the log."""


def refuse_short_log(path: Path, iteration: int) -> None:
    """Raise UserError where a log with lines for every step has none for the step that the checkpoint was taken at.

    A log that is not there may have been moved away on purpose; `cut_log` says so. Raises OSError.
    """
    if not path.is_file():
        return
    last = 0
    with open(path, "rb") as file:
        for line in file:
            step = _step(line)
            if step == iteration:
                return
            last = max(last, step) if step is not None and step < iteration else last
    raise UserError(
        f"{path}: has no line of step {iteration}, where the checkpoint was taken (the last before it: step {last}); "
        f"put the whole file back, or move this one away to go on with a log that begins at step {iteration + 1}"
    )


def cut_log(path: Path, first: int, *, is_continued: bool = False) -> list[str]:
    """Drop the lines of step `first` and later ones, and a torn last line; what a person should know of it.

    Args:
        first: the first step that will be logged; 1: the log begins anew.
        is_continued: whether the run goes on in this folder.

    Raises:
        OSError: the file cannot be read or written.
    """
    if not path.is_file():
        return [f"{path}: is not there; it begins at step {first}"] if is_continued and first > 1 else []
    if first == 1:  # a start that came to nothing
        return _begin_anew(path)
    kept, end, is_whole, position = 0, 0, True, 0
    unreadable: list[int] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            step = _step(line)
            if step is not None and step < first:
                is_whole = is_whole and end == position - len(line)
                kept, end = kept + 1, position
            elif step is None and line.endswith(b"\n"):
                unreadable.append(number)
    if is_whole and not unreadable:
        if end < position:
            os.truncate(path, end)
        return []
    _split(path, first)
    if not unreadable:
        return []
    lines = f"line{'s' if len(unreadable) > 1 else ''} {', '.join(map(str, unreadable[:10]))}"
    more = f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
    return [f"{path}: {lines}{more} cannot be read; kept in {path.name}{UNREADABLE}, the other {kept} stay"]


def _begin_anew(path: Path) -> list[str]:
    with open(path, "rb") as file:
        dropped = sum(_step(line) not in (None, 0) for line in file)
    os.truncate(path, 0)
    return [f"{path}: dropped {dropped} lines of a start that left no checkpoint"] if dropped else []


def _split(path: Path, first: int) -> None:
    """Rewrite the log with the lines before `first`; those that cannot be read go beside it first."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as good,
            open(path.with_name(path.name + UNREADABLE), "ab") as bad,
            open(path, "rb") as file,
        ):
            for line in file:
                step = _step(line)
                if step is not None and step < first:
                    good.write(line)
                elif step is None and line.endswith(b"\n"):
                    bad.write(line)
            sync_file(bad)
            sync_file(good)
        temporary.chmod(0o644)  # mkstemp keeps others out
        publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _step(line: bytes) -> int | None:
    """The step that a line belongs to; None where it cannot be read, or has no end."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
