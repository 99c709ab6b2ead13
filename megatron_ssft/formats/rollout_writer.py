"""Rollout files while they are made: appended line by line, resumed after a kill."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.rollouts import FileChecks, Rollout, RolloutKey, Sample, origin_of, to_line

_START = b'{"id": '
"""Every line written here starts so; a torn one is cut off only if it does too."""


class RolloutWriter:
    """Appends rollouts to a file that no other program may write meanwhile. A context manager.

    Lines reach the file by the time `write` returns and outlive the process; being killed within `write` leaves at
    most its own lines missing, the last of them perhaps torn: start with `resume_rollouts`, which repairs that.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or create the file. Raises UserError if that fails or another program is writing it."""
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        _lock(self._file.fileno(), self._path)

    def write(self, rollouts: Iterable[Sample]) -> None:
        """Append `rollouts`. Raises UserError if the disk refuses."""
        data = memoryview("".join(map(to_line, rollouts)).encode("ascii"))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def close(self) -> None:
        """Bring everything onto the disk and close the file. Raises UserError if the disk refuses."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        finally:
            self._file.close()

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self._file.close()  # the first error is the one to tell


def resume_rollouts(
    path: str | Path,
    *,
    model: str,
    tokenizer: str,
    sampling: Mapping[str, object],
    prompts: Mapping[str, str] | None = None,
) -> set[RolloutKey]:
    """Read what a rollout file already holds, after cutting off a last line that was never finished.

    `prompts`: the `prompt` that the lines of each question must have, by id; questions it does not name are not
    compared. An absent or empty file gives the empty set. Raises UserError, and leaves the file as it is, where a line
    is wrong, another program is writing it, or it comes from another model, tokenizer, prompt or other sampling
    settings.
    """
    path = Path(path)
    if not path.exists():
        return set()
    expected = origin_of(model, tokenizer, json.loads(json.dumps(dict(sampling))))
    try:
        with path.open("r+b") as file:
            _lock(file.fileno(), path)
            finished, whole, torn = _scan(file, path, expected, prompts or {})
            if torn:
                if torn[: len(_START)] != _START[: len(torn)]:
                    raise UserError(f"{path}: does not look like a file of rollouts; give another --output")
                file.truncate(whole)
                os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error
    return finished


def _scan(
    file: Iterable[bytes], path: Path, expected: dict[str, object], prompts: Mapping[str, str]
) -> tuple[set[RolloutKey], int, bytes]:
    """Keys of the whole lines, their size in bytes, and what follows the last line feed."""
    checks, whole = FileChecks(path, Rollout, expected), 0
    for number, raw in enumerate(file, start=1):
        if not raw.endswith(b"\n"):
            return set(checks.lines), whole, raw
        record = checks.parse(number, raw)
        if record.prompt != prompts.get(record.id, record.prompt):
            raise UserError(f"{path}:{number}: id {record.id!r}: {_other_prompt(record.prompt)}; give another --output")
        whole += len(raw)
    return set(checks.lines), whole, b""


def _other_prompt(prompt: str | None) -> str:
    if prompt is None:
        return "the line has no 'prompt', so whether the question is still the same cannot be told"
    return "the question's prompt is not the one this sample was made from"


def _lock(descriptor: int, path: Path) -> None:
    """Hold the file until the descriptor is closed. Raises UserError if another program holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{path}: another program is writing it; wait for it or give another --output") from error
    except OSError:
        return  # a file system without locks; the file is still good for one writer


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot write the rollouts: {reason_of(error)}; start again to resume")
