"""Marks of jobs that read a run folder which another job writes: nothing is removed there meanwhile.

A mark is a file in the folder. It counts as long as its owner lives, or touches it where that cannot be seen. Where a
reader may not write, it leaves no mark.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from megatron_ssft.formats.files import whole_file
from megatron_ssft.formats.lease import BEAT_SECONDS, SILENCE_SECONDS, Owner, this_process

_PATTERN = ".reading.*.json"


@contextlib.contextmanager
def reading(run: Path) -> Iterator[None]:
    """Mark a run folder as being read inside the `with` block."""
    owner = this_process()
    path = run / f".reading.{owner.token}.json"
    try:
        with whole_file(path) as file:
            file.write(msgspec.json.encode(owner).decode())
    except OSError:  # a folder of somebody else
        yield
        return
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(path, ended), name="reading", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        path.unlink(missing_ok=True)


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


class ReadMarks:
    """The marks in a folder, as the job that writes there sees them."""

    def __init__(self, run: Path, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._run = run
        self._silence = silence_seconds
        self._seen: dict[Path, tuple[int, float]] = {}
        """Time of the last touch by the file's clock, and when it was first seen by ours."""

    def reader(self) -> str | None:
        """Who reads the folder; None: nobody. Marks of the dead are removed. Raises OSError."""
        for path in sorted(self._run.glob(_PATTERN)):
            owner = self._owner(path)
            if owner is not None:
                return str(owner)
        return None

    def _owner(self, path: Path) -> Owner | None:
        """The owner of a mark, if it lives."""
        try:
            touched = path.stat().st_mtime_ns
            owner = msgspec.json.decode(path.read_bytes(), type=Owner)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:  # nobody writes a part of one
            path.unlink(missing_ok=True)
            return None
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if touched != before:
            since = now
            self._seen[path] = (touched, now)
        if owner.is_dead or (not owner.runs_here and now - since > self._silence):
            path.unlink(missing_ok=True)
            return None
        return owner
