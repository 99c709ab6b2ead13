"""Programs against tests: whole programs by their output, functions by a test's asserts.

The program is a fenced block of the text (code_blocks.py). Standard input and output as LiveCodeBench compares them:
line by line without the spaces at their ends, and numbers by value. Every test must pass; the first that does not
decides. Tests of a function must have called it (sandbox/function_test_plan.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from megatron_ssft.scoring.sandbox.function_test_needs import UnusableTests
from megatron_ssft.scoring.sandbox.function_test_plan import read_test_set
from megatron_ssft.scoring.sandbox.function_tests import run_function_tests
from megatron_ssft.scoring.sandbox.programs import Limits, run_program
from megatron_ssft.scoring.verifiers.code_blocks import extract
from megatron_ssft.scoring.verifiers.common import (
    NO_ANSWER,
    Judgement,
    Question,
    Settings,
    UnusableQuestion,
)

_ENTRY_POINT = re.compile(r"(?:[^\W\d]\w*(?:\(\))?\.)?[^\W\d]\w*")
"""A function, or a method as `Class.method` or `Class().method`."""
_POINT = re.compile(r"[.eE]")


@dataclass(frozen=True)
class Case:
    """One run of a whole program."""

    input: str
    output: str
    """What it must write, as `same_output` compares."""


@dataclass(frozen=True)
class ProgramTests:
    """Tests of a whole program."""

    preamble: str
    """Python that goes in front of the solution."""
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class FunctionTests:
    """Tests of a function."""

    preamble: str
    code: str
    entry_point: str


def read_tests(question: Question) -> ProgramTests | FunctionTests:
    """Read the field `tests`. Raises UnusableQuestion unless it is complete."""
    tests = question.get("tests")
    if not isinstance(tests, Mapping):
        raise UnusableQuestion("'tests' is missing; expected an object with 'type' stdin or function")
    preamble = tests.get("preamble", "")
    if not isinstance(preamble, str):
        raise UnusableQuestion("'preamble' of 'tests' must be a string of Python")
    if tests.get("type") == "stdin":
        return ProgramTests(preamble, _read_cases(tests.get("cases")))
    if tests.get("type") == "function":
        code, entry_point = tests.get("code"), tests.get("entry_point")
        if not isinstance(code, str) or not isinstance(entry_point, str) or not entry_point:
            raise UnusableQuestion("function 'tests' must have the strings 'code' and 'entry_point'")
        if not _ENTRY_POINT.fullmatch(entry_point):
            raise UnusableQuestion(f"'entry_point' of 'tests' must name a function, not {entry_point[:40]!r}")
        return FunctionTests(preamble, code, entry_point.replace("()", ""))
    raise UnusableQuestion(f"'type' of 'tests' must be stdin or function, not {tests.get('type')!r}")


def _read_cases(rows: object) -> tuple[Case, ...]:
    if not isinstance(rows, list) or not rows:
        raise UnusableQuestion("'tests' has no 'cases'; expected a list of {\"input\", \"output\"}")
    cases = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in ("input", "output")):
            raise UnusableQuestion(f"case {number} of 'tests' must have the strings 'input' and 'output'")
        cases.append(Case(row["input"], row["output"]))
    return tuple(cases)


def count_programs(question: Question) -> int:
    """Count the processes that one solution takes: one per case, two for the tests of a function."""
    tests = read_tests(question)
    return 2 if isinstance(tests, FunctionTests) else len(tests.cases)


def check_question(question: Question) -> None:
    """Raises UnusableQuestion unless `tests` are complete and know what they use."""
    tests = read_tests(question)
    if isinstance(tests, FunctionTests):
        try:
            read_test_set(tests.code, tests.entry_point)
        except UnusableTests as error:
            raise UnusableQuestion(str(error)) from error


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Run the program of `text` against the tests. Raises SandboxError if the sandbox fails on the way."""
    tests = read_tests(question)
    entry_point = tests.entry_point if isinstance(tests, FunctionTests) else None
    source = extract(text, settings.answer_after, entry_point)
    if source is None:
        return NO_ANSWER
    limits = Limits(settings.timeout, settings.memory_mb, settings.processor)
    if isinstance(tests, FunctionTests):
        verdict = run_function_tests(
            source,
            tests.code,
            tests.entry_point,
            limits,
            settings.mechanism,
            preamble=tests.preamble,
            float_tolerance=settings.float_tolerance,
        )
        return Judgement(verdict, source)
    for case in tests.cases:
        stdin = case.input.encode("utf-8", "replace")
        output, problem = run_program(source, stdin, limits, settings.mechanism, preamble=tests.preamble)
        if problem is not None:
            return Judgement(problem, source)
        if not same_output(output.decode("utf-8", "replace"), case.output, settings.float_tolerance):
            return Judgement("wrong", source)
    return Judgement("correct", source)


def same_output(output: str, expected: str, float_tolerance: float = 0.0) -> bool:
    """Whether two outputs agree, blank lines at the ends aside.

    `float_tolerance`: numbers a and b, one of them written with a point or an exponent, agree if they differ by at most
    this times the largest of 1, |a| and |b|. With 0 numbers agree if they are equal.
    """
    lines, expected_lines = (side.strip().splitlines() for side in (output, expected))
    return len(lines) == len(expected_lines) and all(
        _same_line(line, other, float_tolerance) for line, other in zip(lines, expected_lines)
    )


def _same_line(line: str, expected: str, float_tolerance: float) -> bool:
    line, expected = line.strip(), expected.strip()
    if line == expected:
        return True
    words, expected_words = line.split(), expected.split()
    if len(words) != len(expected_words):
        return False
    try:
        return all(_same_number(a, b, float_tolerance) for a, b in zip(words, expected_words))
    except InvalidOperation:
        return False


def _same_number(word: str, expected: str, float_tolerance: float) -> bool:
    """Raises InvalidOperation where one of them is no number."""
    a, b = Decimal(word), Decimal(expected)
    if a == b or not float_tolerance or not _POINT.search(word + expected):
        return a == b
    return math.isclose(float(a), float(b), rel_tol=float_tolerance, abs_tol=float_tolerance)
