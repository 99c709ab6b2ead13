"""What the loop keeps on disk between its stages: which have begun, with what, and which are done."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.run_folder import checkpoint_folder, latest_checkpoint


class StageFile:
    """stages.json of one round: {stage: {"arguments": [...], "seconds": ...}}, "seconds" where the stage is done.

    Arguments are those that shape the outcome. Paths are taken relative to the loop's folder if they lie in it, so that
    it can be moved.
    """

    def __init__(self, path: Path, work: Path) -> None:
        """Raises UserError if the file is damaged."""
        self._path, self._work = path, work.resolve()
        self._rows: dict[str, dict[str, object]] = {}
        if path.exists():
            rows = read_json(path)
            if not all(isinstance(row, dict) and "arguments" in row for row in rows.values()):
                raise UserError(f"{path}: not a record of stages; remove the round's folder to begin the round again")
            self._rows = rows

    def begin(self, stage: str, arguments: Sequence[object], left_nothing: bool = False) -> bool:
        """Whether the stage is still to be run. Raises UserError if it was begun with other arguments.

        `left_nothing`: what it began with does not bind it, as there is nothing made with that.
        """
        now = [self._spell(argument) for argument in arguments]
        row = self._rows.get(stage)
        if row is not None and left_nothing and "seconds" not in row:
            row = None
        if row is not None and row["arguments"] != now:
            raise UserError(
                f"{self._path}: {stage} was begun with {_difference(row['arguments'], now)}; give the flags of "
                "then, or remove the round's folder to begin the round again"
            )
        if row is None:
            self._rows[stage] = {"arguments": now}
            self._write()
        return "seconds" not in self._rows[stage]

    def finish(self, stage: str, seconds: float = 0.0) -> None:
        """Note that the stage is done."""
        self._rows[stage]["seconds"] = round(seconds, 3)
        self._write()

    def _spell(self, argument: object) -> str:
        if not isinstance(argument, Path):
            return str(argument)
        whole = argument.resolve()
        return str(whole.relative_to(self._work)) if whole.is_relative_to(self._work) else str(whole)

    def _write(self) -> None:
        write_durably(self._path, json.dumps(self._rows, indent=1) + "\n")


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Where two lists of arguments part: `--lr 0.1 and not --lr 0.2`."""
    place = next((k for k, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))

    def words(arguments: Sequence[str]) -> str:
        if place >= len(arguments):
            return "nothing more"
        is_value = place > 0 and arguments[place - 1].startswith("--") and not arguments[place].startswith("--")
        return " ".join(arguments[place - 1 if is_value else place : place + 1])

    return f"{words(before)} and not {words(now)}"


def read_json(path: Path) -> dict[str, object]:
    """The object in a file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON; remove it and what was made after it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; remove it and what was made after it")
    return value


def read_rows(path: Path) -> list[dict[str, object]]:
    """The objects of a JSON-lines file; none if it is not there. Raises UserError for a line that is none."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines: {error}") from error
    return [row for row in rows if isinstance(row, dict)]


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of the newest complete checkpoint of a run, chosen as the trainer chooses it; None without any."""
    iteration = latest_checkpoint(run)
    return None if iteration is None else checkpoint_folder(run, iteration)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock inside the `with` block. Raises UserError if another program holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+b")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--save {folder}: cannot be written: {error.strerror}; give another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode("ascii", "replace").strip()
            raise UserError(f"--save {folder}: another loop is at work there (process {holder or '?'})") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode("ascii"))
        file.flush()
        yield
