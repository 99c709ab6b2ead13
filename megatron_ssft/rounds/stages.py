"""The loop's record of its stages on disk: which have begun, with which arguments, and which are done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.lease import acquire
from megatron_ssft.formats.run_folder import checkpoint_folder, latest_checkpoint

Row = TypeVar("Row")


class Stage(msgspec.Struct, omit_defaults=True):
    """A stage that has begun."""

    arguments: list[str]
    """Arguments that shape the outcome."""
    seconds: float | None = None
    """Time it took; None while it is not done."""


class StageFile:
    """stages.json of one round: the name of each stage -> `Stage`.

    Paths among the arguments are taken relative to the loop's folder if they lie in it, so that it can be moved.
    """

    def __init__(self, path: Path, work: Path) -> None:
        """Raises UserError if the file is damaged."""
        self._path, self._work = path, work.resolve()
        self._stages: dict[str, Stage] = {}
        if path.exists():
            try:
                self._stages = msgspec.convert(read_json(path), dict[str, Stage])
            except msgspec.ValidationError as error:
                raise UserError(
                    f"{path}: not a record of stages; remove the round's folder to begin the round again"
                ) from error

    def begin(self, stage: str, arguments: Sequence[object], left_nothing: bool = False) -> bool:
        """Whether the stage is still to be run. Raises UserError if it was begun with other arguments.

        `left_nothing`: what it began with does not bind it, as there is nothing made with that.
        """
        words = [self._spell(argument) for argument in arguments]
        entry = self._stages.get(stage)
        if entry is not None and left_nothing and entry.seconds is None:
            entry = None
        if entry is not None and entry.arguments != words:
            raise UserError(
                f"{self._path}: {stage} was begun with {_difference(entry.arguments, words)}; give the flags of "
                "then, or remove the round's folder to begin the round again"
            )
        if entry is None:
            self._stages[stage] = Stage(words)
            self._write()
        return self._stages[stage].seconds is None

    def finish(self, stage: str, seconds: float = 0.0) -> None:
        """Note that the stage is done."""
        self._stages[stage].seconds = round(seconds, 3)
        self._write()

    def _spell(self, argument: object) -> str:
        if not isinstance(argument, Path):
            return str(argument)
        path = argument.resolve()
        return str(path.relative_to(self._work)) if path.is_relative_to(self._work) else str(path)

    def _write(self) -> None:
        write_durably(self._path, json.dumps(msgspec.to_builtins(self._stages), indent=1) + "\n")


def _difference(before: Sequence[str], after: Sequence[str]) -> str:
    """The first place where two lists of arguments differ: `--lr 0.1 and not --lr 0.2`."""
    place = next((k for k, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))

    def words(arguments: Sequence[str]) -> str:
        if place >= len(arguments):
            return "nothing more"
        is_value = place > 0 and arguments[place - 1].startswith("--") and not arguments[place].startswith("--")
        return " ".join(arguments[place - 1 if is_value else place : place + 1])

    return f"{words(before)} and not {words(after)}"


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


def read_record(path: Path, kind: type[Row]) -> Row:
    """The object in a file as a `kind`. Raises UserError."""
    try:
        return msgspec.convert(read_json(path), kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}; remove it and what was made after it") from error


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of the newest complete checkpoint of a run, chosen as the trainer chooses it; None without any."""
    iteration = latest_checkpoint(run)
    return None if iteration is None else checkpoint_folder(run, iteration)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lease inside the `with` block. Raises UserError if another program holds it."""
    try:
        lease = acquire(folder, "--save ")
    except OSError as error:
        raise UserError(f"--save {folder}: cannot be written: {reason_of(error)}; give another folder") from error
    try:
        yield
    finally:
        lease.release()
