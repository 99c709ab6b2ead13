"""The process beside a rank that keeps what it prints: all of it in the rank's log, and some of it on the console.

It is a process of its own, as it has to outlive a rank that crashes. It needs the standard library alone, and is
started by its path (rank_output.py):

    output_forwarder.py LOG RANK OUTPUT_FD ERRORS_FD     (OUTPUT_FD -1: standard output goes to the log without it)
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import sys

_CHUNK = 1 << 16
_MOST_WARNINGS = 20
"""Warnings of a rank other than the first that the console shows."""
_LONGEST_LINE = 1 << 20
"""Bytes without an end of line that are taken for one."""
_SPOKEN = re.compile(rb"^\[rank ?\d+\]")
"""What a rank says of itself; torch's own messages begin like this, too."""
_CRASH = re.compile(
    rb"^(Traceback \(most recent call last\)|Fatal Python error|Current thread 0x|terminate called|Segmentation fault"
    rb"|Aborted|free\(\)|malloc|double free|corrupted )|^  what\(\)"
)
_WARNING = re.compile(rb"(Warning: |\b(WARNING|ERROR|CRITICAL|FATAL)\b|^\[?[WEF]\d{4} )")


class Chooser:
    """Which lines of a rank other than the first the console shows."""

    def __init__(self, rank: int, log: str) -> None:
        self._prefix = f"[rank {rank}] ".encode()
        self._log = log.encode()
        self._in_traceback = False
        self._warnings: set[bytes] = set()

    def shown(self, line: bytes) -> bytes:
        """What the console gets of a line of standard error; may be nothing."""
        if _SPOKEN.match(line):
            return line
        if _CRASH.match(line):
            self._in_traceback = line.startswith(b"Traceback")
            return self._prefix + line
        if self._in_traceback:
            # Its last line is the first one that is not indented: the error itself.
            self._in_traceback = line.startswith((b" ", b"\t")) or not line.strip()
            return self._prefix + line
        return self._warning(line) if _WARNING.search(line) else b""

    def _warning(self, line: bytes) -> bytes:
        """Each once, and not for ever."""
        if line in self._warnings or len(self._warnings) > _MOST_WARNINGS:
            return b""
        self._warnings.add(line)
        if len(self._warnings) > _MOST_WARNINGS:
            return self._prefix + b"further warnings are in " + self._log + b" alone\n"
        return self._prefix + line


class Stream:
    """One of the rank's streams, whole lines at a time."""

    def __init__(self, log: int, console: int, chooser: Chooser | None) -> None:
        self._log, self._console, self._chooser = log, console, chooser
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Pass on what came; nothing: that was the end."""
        _write(self._log, data)
        if self._chooser is None:
            _write(self._console, data)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > _LONGEST_LINE):
            lines, self._rest = [*lines, self._rest], b""
        _write(self._console, b"".join(self._chooser.shown(line + b"\n") for line in lines))


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it. A console that is gone, or a full disk, must not end what writes to the other one."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        pass


def main(log: str, rank: int, output: int, errors: int) -> None:
    """Forward until nobody writes to the pipes any more."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # those are for the rank, whose last lines are to arrive
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    chooser = None if rank == 0 else Chooser(rank, log)
    selector = selectors.DefaultSelector()
    selector.register(errors, selectors.EVENT_READ, Stream(file, sys.stderr.fileno(), chooser))
    if output >= 0:
        selector.register(output, selectors.EVENT_READ, Stream(file, sys.stdout.fileno(), None))
    while selector.get_map():
        for key, _ in selector.select():
            data = os.read(key.fd, _CHUNK)
            key.data.take(data)
            if not data:
                selector.unregister(key.fd)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
