"""Tests of a function against a solution nobody vouches for: each in a process of its own, behind the same walls."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import BinaryIO

from megatron_ssft.scoring.sandbox.programs import Limits, Program, memory_file, started, watch


def run_function_tests(source: str, tests: str, entry_point: str, limits: Limits, walls: str | None) -> str:
    """Run the Python code `tests` against the function `entry_point` that `source` defines, and return the verdict.

    The solution gets to know the arguments of the calls as they come and nothing else; what it returns reaches the
    tests as plain data (jail/plain_values.py), and only the process of the tests can report success. The time limit
    holds for all calls together, the other limits for each of the two processes. Raises SandboxError.
    """
    with ExitStack() as stack:
        report = memory_file(stack)
        requests, requests_in = _pipe(stack)
        replies, replies_in = _pipe(stack)

        def start(role: str, code: str, ends: dict[str, BinaryIO], more: dict[str, int]) -> Program:
            descriptors = {name: end.fileno() for name, end in ends.items()} | more
            spec = {"role": role, "source": code, "entry_point": entry_point, **descriptors}
            program = started(spec, walls=walls, limits=limits, descriptors=list(descriptors.values()))
            entered = stack.enter_context(program)
            for end in ends.values():  # so that either side sees the other one's end
                end.close()
            return entered

        solution = start("solution", source, {"requests": requests, "replies": replies_in}, {})
        judge = start("tests", tests, {"requests": requests_in, "replies": replies}, {"report": report})
        watch([solution, judge], limits.seconds)
        return _verdict(os.pread(report, 4096, 0), solution, judge)


def _verdict(report: bytes, solution: Program, judge: Program) -> str:
    outcome = json.loads(report) if report else {"outcome": "none", "error": ""}
    if outcome["outcome"] == "passed":
        return "correct"
    if solution.stopped in ("timeout", "disk", "threads"):
        return solution.problem()
    if outcome["outcome"] == "failed":
        return "wrong"
    if outcome["outcome"] == "raised":
        return f"crash: {outcome['error'][:60]}"
    if outcome["outcome"] == "unsupported":
        return "unsupported test"
    if outcome["outcome"] == "gone":
        return solution.problem() or "crash: ended early"
    return judge.problem() or "crash: no report of the tests"


def _pipe(stack: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Reading and writing end, closed by `stack`."""
    read, write = os.pipe()
    return stack.enter_context(os.fdopen(read, "rb", 0)), stack.enter_context(os.fdopen(write, "wb", 0))
