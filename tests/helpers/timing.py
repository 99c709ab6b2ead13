"""The cost of a call: in functions called, and in terms of fixed work on the same machine at the same time."""

from __future__ import annotations

import sys
import time

YARDSTICK = 60_000
"""Steps of the fixed work; 5 ms on a processor of 2023."""


def _yardstick() -> int:
    """Pure Python with a dictionary, a list and integers, as planners have it."""
    total, seen, parts = 0, {}, []
    for i in range(YARDSTICK):
        seen[i & 1023] = total
        parts.append(i ^ total)
        total = (total + seen[i & 255]) & 0xFFFF
    return total + len(parts)


def _processor_seconds(call):
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def yardsticks(call, limit, tries=12):
    """What `call()` returned, and its cost in yardsticks; no more tries than it takes to get below `limit`.

    Seconds say nothing on a machine that is slower or busy. Both sides are timed in turn, and the least of each counts.
    """
    least, unit = float("inf"), float("inf")
    for _ in range(tries):
        unit = min(unit, _processor_seconds(_yardstick)[1])
        result, seconds = _processor_seconds(call)
        least = min(least, seconds)
        if least / unit < limit:
            break
    return result, least / unit


def calls_of(call):
    """How many functions `call()` calls, in Python or in C: a cost that no other program changes."""
    count = 0

    def see(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count
