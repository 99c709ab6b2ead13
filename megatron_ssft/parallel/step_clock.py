"""Where a rank's time goes: each moment belongs to one part of a step, so the parts add up to the whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

PARTS = ("data", "forward_backward", "optimizer", "evaluation", "save", "other")
"""Parts that every step has, if only for no time at all; an objective may have more."""
_REST = "other"


class StepClock:
    """A stack of parts on one rank. The innermost one has the time; outside all of them it is `other`."""

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        """`now`: a clock in nanoseconds."""
        self._now = now
        self._stack = [_REST]
        self._spent = dict.fromkeys(PARTS, 0)
        self._since = now()

    @property
    def current(self) -> str:
        """The part that time goes to."""
        return self._stack[-1]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Give the time inside the `with` block to this part, but for that of parts inside it."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last call. They add up to the time between the two calls."""
        self._settle()
        spent, self._spent = self._spent, dict.fromkeys(PARTS, 0)
        return {name: nanoseconds / 1e9 for name, nanoseconds in spent.items()}

    def _settle(self) -> None:
        now = self._now()
        self._spent[self.current] = self._spent.get(self.current, 0) + now - self._since
        self._since = now
