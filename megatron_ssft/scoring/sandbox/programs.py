"""Programs nobody vouches for, run in processes of their own under restrictions, watched from outside.

The process applies its restrictions itself (inside/restrictions.py) before the program begins. A program reads the
interpreter's folders and writes a temporary folder; its environment is PATH and LANG. It has one processor, and limited
time, memory, file sizes and threads. It cannot start processes, open sockets, signal anyone or read any other file.
Standard input, output and errors are files in memory, so that nothing it does to them can block the parent.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from megatron_ssft.scoring.sandbox import seccomp
from megatron_ssft.scoring.sandbox.inside.specification import Mechanism, Specification, Task

MAX_THREADS = 64
MAX_FILE_BYTES = 16 << 20
"""Size of one file; standard output is one."""
MAX_FOLDER_BYTES = 64 << 20
MAX_FOLDER_FILES = 1000
MAX_OPEN_FILES = 32
STACK_BYTES = 64 << 20

ENDED_BY = "ended by: "
"""Text that inside/child.py writes before the name of the exception that ended the program."""
_CHILD = Path(__file__).with_name("inside") / "child.py"
_POLL_SECONDS = 0.02
_START_SECONDS = 60.0
"""For the interpreter and the restrictions, on a busy machine; the program's own time starts after that."""
_GRACE_SECONDS = 1.0
_STDERR_TAIL = 4096
_SYSTEM_PATHS = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"),
    *("/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"),
)


StopReason = Literal["timeout", "disk", "threads", "unwanted"]


class SandboxError(RuntimeError):
    """The restrictions could not be applied."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Wall clock, from the first line of the program."""
    memory_mb: int = 1024
    """Address space in MiB."""
    processor: int = 0
    """Which of the allowed processors, modulo their number."""


@dataclass
class Program:
    """A process in the sandbox."""

    process: subprocess.Popen[bytes]
    folder: str
    stdout: int
    stderr: int
    stopped: StopReason | None = None
    """Why it was killed from outside; None if it was not."""

    def stop(self, reason: StopReason = "unwanted") -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.stopped = reason
            os.killpg(self.process.pid, signal.SIGKILL)  # without a mechanism there may be others
            self.process.wait()

    def error_output(self) -> str:
        """The end of what it wrote to standard error."""
        size = os.fstat(self.stderr).st_size
        return os.pread(self.stderr, _STDERR_TAIL, max(0, size - _STDERR_TAIL)).decode("utf-8", "replace")

    def problem(self) -> str | None:
        """Say why it failed, as a verdict; None if it ended with status 0. Only after its end."""
        status = self.process.returncode
        if self.stopped in ("timeout", "disk"):
            return self.stopped
        if self.stopped is not None:
            return "crash: too many threads" if self.stopped == "threads" else "crash: had to be stopped"
        if status in (-signal.SIGXCPU, -signal.SIGXFSZ):
            return "timeout" if status == -signal.SIGXCPU else "disk"
        if status < 0:
            return f"crash: {signal.Signals(-status).name}"
        return self._python_error(status) if status else None

    def _python_error(self, status: int) -> str:
        """From the line that the child's excepthook leaves."""
        last = self.error_output().rpartition("\n")[2]
        name = last.removeprefix(ENDED_BY)[:60]
        if name == last or not (name.isidentifier() and name.isascii()):
            return f"crash: exit status {status}"
        if name.endswith("MemoryError"):
            return "memory"
        return "disk" if name == "FileTooLarge" else f"crash: {name}"

    def excess(self) -> Literal["disk", "threads"] | None:
        """Look for a limit that it exceeds at the moment."""
        size = 0
        with os.scandir(self.folder) as entries:
            for count, entry in enumerate(entries):
                try:
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:
                    continue
                if count > MAX_FOLDER_FILES or size > MAX_FOLDER_BYTES:
                    return "disk"
        try:
            num_threads = psutil.Process(self.process.pid).num_threads()
        except psutil.NoSuchProcess:
            return None
        return "threads" if num_threads > MAX_THREADS else None


def watch(programs: Sequence[Program], seconds: float) -> None:
    """Wait until the last of `programs` ends, killing what exceeds its limits; in the end none of them runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            programs[-1].process.wait(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
            break
        except subprocess.TimeoutExpired:
            for program in programs:
                if reason := program.excess():
                    program.stop(reason)
    else:
        for program in programs:
            program.stop("timeout")
    for program in programs:
        try:
            program.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            program.stop()


@contextmanager
def start_program(
    task: Task, *, mechanism: Mechanism | None, limits: Limits, stdin: bytes = b"", descriptors: Sequence[int] = ()
) -> Iterator[Program]:
    """Start a program, which has just begun to run the source when this returns; gone with its folder afterwards.

    `mechanism`: None for resource limits alone. Raises SandboxError if the restrictions cannot be applied.
    """
    with ExitStack() as stack:
        base = os.path.realpath(tempfile.mkdtemp(prefix="ssft-program-"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        folder, root = os.path.join(base, "box"), os.path.join(base, "root")
        os.mkdir(folder, 0o700)
        os.mkdir(root, 0o700)
        spec_file, stdin_file, stdout, stderr = (memory_file(stack) for _ in range(4))
        spec = _specification(task, mechanism, limits, folder, root)
        _fill(spec_file, json.dumps(spec).encode("ascii"))
        _fill(stdin_file, stdin)
        ready, ready_child = os.pipe()
        stack.callback(os.close, ready)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), str(spec_file), str(ready_child)],
                stdin=stdin_file,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
                pass_fds=(spec_file, ready_child, *descriptors),
                start_new_session=True,
            )
        finally:
            os.close(ready_child)
        program = Program(process, folder, stdout, stderr)
        stack.callback(program.stop)
        if not select.select([ready], [], [], _START_SECONDS)[0] or os.read(ready, 1) != b"1":
            program.stop()
            raise SandboxError(program.error_output().strip().rpartition("\n")[2] or f"status {process.returncode}")
        yield program


def _specification(task: Task, mechanism: Mechanism | None, limits: Limits, folder: str, root: str) -> Specification:
    """Add the restrictions to the task."""
    return {
        **task,
        "mechanism": mechanism,
        "folder": folder,
        "root": root,
        "readable": readable_paths(),
        "filter": base64.b64encode(seccomp.build_filter()).decode() if mechanism is not None else "",
        "limits": {
            "cpu_seconds": int(limits.seconds) + 2,
            "memory": limits.memory_mb << 20,
            "file_size": MAX_FILE_BYTES,
            "open_files": MAX_OPEN_FILES,
            "stack": STACK_BYTES,
        },
        "processor": limits.processor,
        "parent": os.getpid(),
    }


def run_program(
    source: str, stdin: bytes, limits: Limits, mechanism: Mechanism | None, *, preamble: str = ""
) -> tuple[bytes, str | None]:
    """Run a whole program on one input, after `preamble` in the same module.

    Returns what it wrote to standard output (its first MAX_FILE_BYTES) and why it failed, as a verdict, or None.
    Raises SandboxError.
    """
    task: Task = {"role": "program", "source": source, "preamble": preamble}
    with start_program(task, mechanism=mechanism, limits=limits, stdin=stdin) as program:
        watch([program], limits.seconds)
        return os.pread(program.stdout, MAX_FILE_BYTES, 0), program.problem()


@functools.cache
def readable_paths() -> tuple[str, ...]:
    """List what a program may read: the interpreter, its packages, the system's libraries; outer folders first."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *_SYSTEM_PATHS}
    paths.update(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    ordered = sorted({os.path.normpath(path) for path in paths if os.path.exists(path)} - {"/"})
    return tuple(
        path for path in ordered if os.path.islink(path) or not any(path.startswith(f"{outer}/") for outer in ordered)
    )


def memory_file(stack: ExitStack) -> int:
    """Open an empty file in memory, closed by `stack`, and return its descriptor."""
    descriptor = os.memfd_create("ssft")
    stack.callback(os.close, descriptor)
    return descriptor


def _fill(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
