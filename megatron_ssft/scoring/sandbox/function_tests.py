"""Tests of a function against a solution nobody vouches for, each in a process of its own in the sandbox."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import BinaryIO

from megatron_ssft.scoring.sandbox.function_test_plan import read_test_set
from megatron_ssft.scoring.sandbox.inside.specification import Mechanism, Report, Task
from megatron_ssft.scoring.sandbox.programs import Limits, Program, memory_file, start_program, watch


def run_function_tests(
    source: str,
    tests: str,
    entry_point: str,
    limits: Limits,
    mechanism: Mechanism | None,
    *,
    preamble: str = "",
    float_tolerance: float = 0.0,
) -> str:
    """Run the Python code `tests` against the function `entry_point` that `source` defines, and return the verdict.

    `preamble` runs before the source, in its module. `float_tolerance`: as plain_values.tolerant_float defines.

    The solution gets to know the arguments of the calls as they come and nothing else; what it returns reaches the
    tests as plain data (inside/plain_values.py), and only the process of the tests can report success. The time limit
    holds for all calls together, the other limits for each of the two processes. Raises UnusableTests, SandboxError.
    """
    plan = read_test_set(tests, entry_point)
    with ExitStack() as stack:
        report = memory_file(stack)
        requests, requests_in = _pipe(stack)
        replies, replies_in = _pipe(stack)

        def start(task: Task, ends: tuple[BinaryIO, BinaryIO], *others: int) -> Program:
            descriptors = [*(end.fileno() for end in ends), *others]
            program = stack.enter_context(
                start_program(task, mechanism=mechanism, limits=limits, descriptors=descriptors)
            )
            for end in ends:  # so that either side sees the other one's end
                end.close()
            return program

        solution_task: Task = {
            "role": "solution",
            "source": source,
            "preamble": preamble,
            "entry_point": entry_point,
            "requests": requests.fileno(),
            "replies": replies_in.fileno(),
            "returns_output": plan["output"],
        }
        solution = start(solution_task, (requests, replies_in))
        tests_task: Task = {
            "role": "tests",
            "source": tests,
            "entry_point": entry_point,
            "requests": requests_in.fileno(),
            "replies": replies.fileno(),
            "report": report,
            "plan": plan,
            "float_tolerance": float_tolerance,
        }
        judge = start(tests_task, (requests_in, replies), report)
        watch([solution, judge], limits.seconds)
        return _verdict(os.pread(report, 4096, 0), solution, judge)


def _verdict(report: bytes, solution: Program, judge: Program) -> str:
    result: Report = json.loads(report) if report else {"outcome": "none", "error": ""}
    if result["outcome"] == "passed":
        return "correct"
    problem = solution.problem()
    if problem is not None and solution.stopped in ("timeout", "disk", "threads"):
        return problem
    if result["outcome"] == "failed":
        return "wrong"
    if result["outcome"] == "raised":
        return f"crash: {result['error'][:60]}"
    if result["outcome"] == "unsupported":
        return "unsupported test"
    if result["outcome"] == "unknown result":
        return f"unsupported result: {result['error'][:60]}"
    if result["outcome"] == "gone":
        return problem or "crash: ended early"
    if result["outcome"] == "uncalled":
        return problem or "unsupported test: never calls the function"
    return judge.problem() or "crash: no report of the tests"


def _pipe(stack: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Reading and writing end, closed by `stack`."""
    read, write = os.pipe()
    return stack.enter_context(os.fdopen(read, "rb", 0)), stack.enter_context(os.fdopen(write, "wb", 0))
