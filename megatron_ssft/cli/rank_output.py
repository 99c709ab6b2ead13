"""--log-dir: all that a rank prints, native code too, in a file of its own; the console stays readable.

The descriptors themselves are turned, so that it does not matter who writes to them. A second process
(output_forwarder.py) passes on what the console is to show.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ssft.cli import output_forwarder
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.launch import Launch, this_launch

_OUTPUT, _ERRORS = 1, 2
_DRAIN_SECONDS = 10.0
"""How long a rank that ends waits for the console to show its last lines."""


def rank_log(folder: Path, rank: int) -> Path:
    """Where the output of a rank goes."""
    return folder / f"rank{rank}.log"


def keep_output(folder: str | None) -> None:
    """From now on this rank's standard output and error go to `folder`/rankN.log; None: nothing changes.

    The console goes on showing all of the first rank, and what other ranks say of themselves, their tracebacks and
    their warnings. A log that is there is appended to. Raises UserError where it cannot be written.
    """
    if folder is None:
        return
    launch = this_launch()
    path = rank_log(Path(folder), launch.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(log, _heading(launch).encode())
    except OSError as error:
        raise UserError(
            f"--log-dir {folder}: {path.name} cannot be written: {reason_of(error)}; name another folder"
        ) from error
    _flush()
    errors, written_errors = os.pipe()
    output, written_output = os.pipe() if launch.is_first else (-1, log)
    forwarder = subprocess.Popen(
        [sys.executable, "-P", "-S", str(output_forwarder.__file__), str(path.resolve()), str(launch.rank)]
        + [str(output), str(errors)],
        pass_fds=[fd for fd in (output, errors) if fd >= 0],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a launcher ends the rank's group; the last lines are still to arrive
    )
    consoles = os.dup(_OUTPUT), os.dup(_ERRORS)
    os.dup2(written_output, _OUTPUT)
    os.dup2(written_errors, _ERRORS)
    for descriptor in {log, errors, written_errors, output, written_output} - {-1}:
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    atexit.register(_ending(forwarder, consoles))


def _heading(launch: Launch) -> str:
    """Tells the starts in one log apart."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return f"-- {now} rank {launch.rank} of {launch.world_size}, process {os.getpid()} on {socket.gethostname()}\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _ending(forwarder: subprocess.Popen[bytes], consoles: tuple[int, int]) -> Callable[[], None]:
    """What waits at the end of this process until the console has shown everything."""

    def end() -> None:
        _flush()
        for console, descriptor in zip(consoles, (_OUTPUT, _ERRORS)):
            os.dup2(console, descriptor)  # and so closes the pipe
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that this one started may write still
            forwarder.wait(_DRAIN_SECONDS)

    return end
