"""Start and end the loop's programs, so that none outlives the loop unnoticed.

A stage may be a whole tree of processes, and torchrun puts its ranks into sessions of their own, so no process group
holds them all. Three things together do:

- the program gets SIGTERM from the kernel when the loop dies, by whatever signal; torchrun hands it on to its ranks;
- all of its processes inherit a variable that names the loop's folder, by which `Children.sweep` finds and kills what
  is left: after every stage, and before the first one, so that a restarted loop does not race what it left behind;
- before it runs, a program makes sure that the loop is still there, in case that died while it was started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import psutil

from megatron_ssft.errors import UserError
from megatron_ssft.signals import StopSignal

MARK = "MEGATRON_SSFT_LOOP"
_PR_SET_PDEATHSIG = 1
_SWEEP_SECONDS = 60.0
_POLL_SECONDS = 0.05
_ASK_SECONDS = 60.0
_libc = ctypes.CDLL(None, use_errno=True)


class StageFailure(Exception):
    """A program ended otherwise than it should; `status` is what the loop ends with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Stopped(Exception):
    """The loop was told to stop, and the stage under way has ended."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def raise_if_stopped(stop: StopSignal, where: str) -> None:
    """Raise Stopped if a signal has come."""
    if stop.received:
        raise Stopped(f"stopped by {signal.Signals(stop.number).name} {where}", 128 + stop.number)


Ask = Callable[[subprocess.Popen[bytes]], None]
"""Asks a running program to end by itself."""


class Children:
    """Starts and ends the programs of one loop. For one thread, the main one."""

    def __init__(self, folder: Path, stop: StopSignal) -> None:
        self.stop = stop
        self._folder = str(folder.resolve())

    def start(self, command: Sequence[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        """The program, in a session of its own; `output` takes what it prints. Raises StageFailure (status 127)."""
        loop = os.getpid()

        def bind() -> None:
            # The loop's own handler is in place until the program is executed, and would swallow the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != loop:
                os._exit(1)

        try:
            return subprocess.Popen(
                command,
                env={**os.environ, MARK: self._folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is the loop's to hand on
                preexec_fn=bind,  # safe, as there are no threads
            )
        except OSError as error:
            raise StageFailure(f"{command[0]}: cannot be started: {error.strerror}", 127) from error

    def run(self, command: Sequence[str], ask: Ask | None = None, watch: Callable[[], None] | None = None) -> int:
        """Run a program to its end and return its status, 128 + n for signal n. Raises StageFailure.

        A stop signal is handed on by `ask` (default: SIGTERM), and the program is waited for all the same. `watch` is
        called all the time; if it raises, the program is ended.
        """
        child, asked = self.start(command), False
        try:
            while True:
                try:
                    status = child.wait(_POLL_SECONDS)
                    return status if status >= 0 else 128 - status
                except subprocess.TimeoutExpired:
                    pass
                if self.stop.number and not asked:
                    asked = True
                    (ask or terminate)(child)
                if watch is not None:
                    watch()
        finally:
            if child.poll() is None:
                end(child, 0.0)

    def sweep(self) -> None:
        """Kill whatever is left of the programs of this folder's loops. Raises UserError if that takes too long."""
        deadline = time.monotonic() + _SWEEP_SECONDS
        while survivors := _with_variable(psutil.process_iter(), MARK, self._folder):
            if time.monotonic() > deadline:
                raise UserError(f"process {survivors[0].pid} of an earlier stage does not end; end it and start again")
            for process in survivors:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_POLL_SECONDS)


def terminate(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the program itself."""
    _signal(child.pid, signal.SIGTERM)


def terminate_ranks(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the ranks under a launcher on this machine, or to a program that has none.

    torchrun itself would kill its ranks 30 seconds after its own SIGTERM, which is too early for a large checkpoint.
    """
    try:
        ranks = _with_variable(psutil.Process(child.pid).children(), "LOCAL_RANK")
    except psutil.NoSuchProcess:
        return
    if not ranks:
        terminate(child)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.terminate()


def asking_by(command: str) -> Ask:
    """A way to ask ranks on other machines: run `command`, and if that fails send SIGTERM to the launcher."""

    def ask(child: subprocess.Popen[bytes]) -> None:
        try:
            result = subprocess.run(shlex.split(command), stdin=subprocess.DEVNULL, check=False, timeout=_ASK_SECONDS)
            failed = result.returncode != 0
        except (OSError, subprocess.TimeoutExpired):
            failed = True
        if failed:
            terminate(child)

    return ask


def end(child: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM to the program's process group, SIGKILL after `grace` seconds; returns when the program has ended."""
    _signal(-child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    _signal(-child.pid, signal.SIGKILL)
    child.wait()


def _signal(pid: int, number: int) -> None:
    """Send a signal to a process, or to a group where `pid` is negative; nothing happens if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _with_variable(processes: Iterable[psutil.Process], name: str, value: str | None = None) -> list[psutil.Process]:
    """The processes that were started with the environment variable `name`, where given with this `value`.

    A process that has ended meanwhile, or belongs to another user, is none of them.
    """
    matches = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if name in environment and value in (None, environment[name]):
                matches.append(process)
    return matches
