"""Programs against tests: whole programs by their output, functions by a test's asserts.

The program is the last fenced Python block of the text. Standard input and output as LiveCodeBench compares them: line
by line without the spaces at their ends, and numbers by value. Every test must pass; the first that does not decides.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from megatron_ssft.scoring.sandbox.function_tests import run_function_tests
from megatron_ssft.scoring.sandbox.programs import Limits, run_program
from megatron_ssft.scoring.verifiers.common import (
    NO_ANSWER,
    Judgement,
    Question,
    Settings,
    UnusableQuestion,
    answer_part,
)

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")


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
        return FunctionTests(preamble, code, entry_point)
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
        _check_test_code(tests.code, tests.entry_point)


def _check_test_code(code: str, entry_point: str) -> None:
    """Refuse tests that use more of the solution than the function under test. Raises UnusableQuestion."""
    try:
        tree = ast.parse(code)
        table = symtable.symtable(code, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableQuestion(f"'code' of 'tests' is not valid Python: {error}") from error
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)):
        return
    if not any(isinstance(node, (ast.Assert, ast.Call)) for node in ast.walk(tree)):
        raise UnusableQuestion("'code' of 'tests' tests nothing")
    names = {entry_point.rsplit(".", 1)[-1], "candidate", "__name__", *dir(builtins)}
    names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used, tables = set(), [table]
    while tables:
        scope = tables.pop()
        tables += scope.get_children()
        names |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned()}
        used |= {s.get_name() for s in scope.get_symbols() if s.is_referenced() and s.is_global()}
    if missing := sorted(used - names):
        raise UnusableQuestion(
            f"the tests use {missing[0]!r}, which they do not define; only {entry_point!r} (also as 'candidate') is "
            "taken from the solution, put helpers into 'code' of 'tests'"
        )


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Run the program of `text` against the tests. Raises SandboxError if the sandbox fails on the way."""
    source = extract(text, settings.answer_after)
    if source is None:
        return NO_ANSWER
    limits = Limits(settings.timeout, settings.memory_mb, settings.processor)
    tests = read_tests(question)
    program = _with_preamble(tests.preamble, source)
    if isinstance(tests, FunctionTests):
        verdict = run_function_tests(program, tests.code, tests.entry_point, limits, settings.mechanism)
        return Judgement(verdict, source)
    for case in tests.cases:
        output, problem = run_program(program, case.input.encode("utf-8", "replace"), limits, settings.mechanism)
        if problem is not None:
            return Judgement(problem, source)
        if not same_output(output.decode("utf-8", "replace"), case.output):
            return Judgement("wrong", source)
    return Judgement("correct", source)


def _with_preamble(preamble: str, source: str) -> str:
    """Put a benchmark's imports and helpers in front of a solution; imports from the future stay first."""
    if not preamble:
        return source
    future = re.compile(r"^from __future__ import .*$", re.MULTILINE)
    return "\n".join([*future.findall(source), preamble, future.sub("", source)])


def extract(text: str, answer_after: str | None) -> str | None:
    """Find the last closed block fenced as Python or as nothing; None if no such block is closed."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    return _last_block(part) or (_last_block(text) if answer_after is None else None)


def _last_block(text: str) -> str | None:
    block: str | None = None
    opened: tuple[str, str, int] | None = None
    for fence in _FENCE.finditer(text):
        mark, language = fence[1], fence[2].strip().lower()
        if opened is None:
            opened = (mark, language, fence.end() + 1)
        elif mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and not language:
            if opened[1] in _PYTHON and text[opened[2] : fence.start()].strip():
                block = textwrap.dedent(text[opened[2] : fence.start()])
            opened = None
        elif language in _PYTHON[1:]:  # the block before was never closed
            opened = (mark, language, fence.end() + 1)
    return block


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs agree, blank lines at the ends aside."""
    lines, expected_lines = (side.strip().splitlines() for side in (output, expected))
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def _same_line(line: str, expected: str) -> bool:
    line, expected = line.strip(), expected.strip()
    if line == expected:
        return True
    words, expected_words = line.split(), expected.split()
    if len(words) != len(expected_words):
        return False
    try:
        return all(Decimal(a) == Decimal(b) for a, b in zip(words, expected_words))
    except InvalidOperation:
        return False
