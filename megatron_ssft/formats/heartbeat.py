"""heartbeat.json in a run's folder: whether the run lives, how far it is, and how it ended, for whoever watches it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import to_object
from megatron_ssft.formats.lease import Owner

HEARTBEAT = "heartbeat.json"
State = Literal["running", "stopped", "done", "failed"]


class Heartbeat(Struct, frozen=True, kw_only=True):
    """A sign of life of the first rank. Times are seconds since 1970 by its host's clock."""

    time: float
    """When it was written."""
    state: State
    """stopped: by SIGTERM, with a checkpoint to go on from."""
    iteration: int
    """Optimizer steps done."""
    train_iters: int | None
    """Of the whole run; null until that is known."""
    phase: str
    loss: float | None
    """Of the last step; null before the first one, and where it is no finite number."""
    host: str
    pid: int
    job_id: str | None
    """SLURM's, or torchrun's --rdzv-id."""
    expected_next_seconds: float
    """While the run lives, the file is written anew within this time."""
    progressed_at: float
    """When the run last got on."""
    limit_seconds: float
    """How long it may do without in this phase."""
    status: int | None = None
    """Exit status of a run that has ended."""
    message: str | None = None
    """Why it failed."""
    process_started: float
    process_space: str
    """With `process_started` and `pid`: which process it is, for readers on the same machine."""

    @property
    def owner(self) -> Owner:
        """The process that writes it."""
        return Owner(
            token="",
            host=self.host,
            pid=self.pid,
            started=self.process_started,
            pid_space=self.process_space,
            job=self.job_id,
        )


class Finding(Struct, frozen=True):
    """What a heartbeat says at a time."""

    state: Literal["alive", "stopped", "done", "stuck", "failed"]
    text: str
    """One line."""


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    """Write it in place of the one before, whole at any moment. Raises OSError, and leaves the one before then.

    Nothing waits for the disk, unlike elsewhere: after a loss of power nobody asks whether the run lives.
    """
    write_bytes(folder, (json.dumps(to_object(heartbeat)) + "\n").encode())


def write_bytes(folder: Path, content: bytes) -> None:
    """Write such a file, as `write_heartbeat` does."""
    path = folder / HEARTBEAT
    temporary = path.with_name(f".{HEARTBEAT}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_heartbeat(folder: Path) -> Heartbeat:
    """The newest sign of life of the run in a folder. Raises UserError."""
    path = folder / HEARTBEAT
    try:
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the heartbeat: {error.strerror}; give the folder of a run that has begun"
        ) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{path}: damaged or of another version: {error}; is it a run of this program?") from error


def judge(beat: Heartbeat, now: float) -> Finding:
    """What is to be thought of a run.

    Args:
        now: seconds since 1970.
    """
    age, still = max(0.0, now - beat.time), max(0.0, now - beat.progressed_at)
    whole = "" if beat.train_iters is None else f" of {beat.train_iters}"
    at = f"step {beat.iteration}{whole}" + ("" if beat.loss is None else f", loss {beat.loss:.4f}")
    owner, ago = beat.owner, duration(age)
    if beat.state == "done":
        return Finding("done", f"done: {at}, {ago} ago")
    if beat.state == "stopped":
        return Finding("stopped", f"stopped: by SIGTERM after {at}, {ago} ago; the same command with --load goes on")
    if beat.state == "failed":
        return Finding("failed", f"failed: status {beat.status} after {at}, {ago} ago: {beat.message}")
    if owner.is_dead:
        return Finding("failed", f"failed: {owner} is gone without a word after {at}; last seen {ago} ago")
    if age > beat.expected_next_seconds:
        return Finding("stuck", f"stuck: no sign of life for {ago} from {owner} after {at}, last seen at: {beat.phase}")
    if still > beat.limit_seconds:
        return Finding("stuck", f"stuck: {owner} lives, but no progress for {duration(still)} at: {beat.phase}; {at}")
    return Finding("alive", f"alive: {at}, {beat.phase}; {owner}, {ago} ago")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours for a person."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
