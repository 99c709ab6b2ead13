"""A fault at the n-th file operation of a program: what a killed node or a full disk does, at a place that repeats."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.captured import run_captured

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
"""Audit events of operations that change a folder; opening a file to write is one more."""
TENSOR = "tests.tensor"
"""Raised by `tensors_as_operations` before a tensor of a checkpoint is written."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def command_main(command: str, words: list[str]) -> Callable[[], int]:
    """The main of `megatron-ssft COMMAND` with these words, imported when it is called."""

    def main() -> int:
        import importlib

        from megatron_ssft.cli.entry import run_command

        module = importlib.import_module(f"megatron_ssft.cli.{command}")
        sys.argv = [f"megatron-ssft {command}", *words]
        return run_command(module.main)

    return main


def tensors_as_operations(seconds=0.0):
    """From now on every tensor that is written into a checkpoint is an operation of its own.

    Args:
        seconds: it takes this long, so that training gets ahead of a save in the background.
    """
    from torch.distributed.checkpoint import filesystem

    real = filesystem._write_item

    def write(transforms, stream, *args, **kwargs):
        sys.audit(TENSOR, stream.name)
        time.sleep(seconds)
        return real(transforms, stream, *args, **kwargs)

    filesystem._write_item = write


def run_slowly_with_fault(*args, **kwargs):
    """`run_with_fault` with a slow disk; tensors are operations too."""
    tensors_as_operations(0.005)
    return run_with_fault(*args, **kwargs)


def run_with_fault(command, words, folder, rank=None, at=None, fault="kill"):
    """Run a command on this rank, with a fault at its file operation number `at` (from 0) in `folder` or below.

    Args:
        rank: where the fault is; None: nowhere.
        fault: "kill": SIGKILL before the operation; "full": the operation finds the disk full, and so do all later.

    Returns:
        (status, stdout, stderr, names of the file operations so far).
    """
    done: list[str] = []
    here, pid = os.path.realpath(folder), os.getpid()

    def watch(event, arguments):
        if event not in (*CHANGES, TENSOR) and not (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        ):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or not watching:
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(here):
            return
        done.append(f"{event} {Path(os.fsdecode(path)).name}")
        if str(rank) != os.environ["RANK"] or len(done) <= at:
            return
        if fault == "full" and event in ("open", "os.mkdir", "os.link"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
        if fault == "kill":
            os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)  # a process of the rank that writes for it

    watching = True
    sys.addaudithook(watch)
    try:
        return *run_captured(command_main(command, list(map(str, words)))), done
    finally:
        watching = False  # a hook cannot be removed
