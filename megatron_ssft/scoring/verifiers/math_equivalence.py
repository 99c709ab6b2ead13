"""Mathematical equality of two extracted answers, asked of math-verify in a process that may hang or crash.

Run as a module this file is that process: it reads `[a, b]` a line and answers `1` or `0`. An answer may spell a
computation without end (10^(10^10)), and no exception reaches into it, so a timer of the system ends the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import lru_cache

from megatron_ssft.errors import UserError

SECONDS = 5.0
"""Limit of one comparison."""
MEMORY = 4 << 30
"""Bytes of address space."""
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}", re.ASCII)


class MathEquivalence:
    """`equivalent(a, b)` for the votes. A context manager: leaving it ends the process behind it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """Raises UserError if math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("--answers math needs the package math-verify; install it or take --answers string")
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._verdicts: dict[tuple[str, str], bool] = {}

    def __call__(self, a: str, b: str) -> bool:
        """False as well where the comparison fails or does not end in time."""
        if a == b:
            return True
        if _WHOLE_NUMBER.fullmatch(a) and _WHOLE_NUMBER.fullmatch(b):
            return int(a) == int(b)
        if (a, b) not in self._verdicts:
            self._verdicts[a, b] = self._ask(a, b)
        return self._verdicts[a, b]

    def _ask(self, a: str, b: str) -> bool:
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None  # pipes
        try:
            process.stdin.write(json.dumps([a, b]) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
        return reply == "1\n"

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", __name__, str(self._seconds)]
        folders = os.pathsep.join(path for path in sys.path if path)
        return subprocess.Popen(
            command,
            text=True,
            env={**os.environ, "PYTHONPATH": folders},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        """End the process; the next question would start another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> MathEquivalence:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _serve(seconds: float) -> None:
    """Answer until the other side closes; the timer, a lack of memory or a crash end the process instead."""
    from math_verify import parse, verify

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the program ends this process by the closed pipe
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parsed = lru_cache(4096)(lambda text: parse(f"${text}$", parsing_timeout=None))
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        a, b = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        same = bool(verify(parsed(a), parsed(b), timeout_seconds=None))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(f"{same:d}\n")
        replies.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
