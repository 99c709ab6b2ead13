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


def check_question(question: Question) -> None:
    """Raises UnusableQuestion unless `tests` are complete."""
    tests = question.get("tests")
    if not isinstance(tests, Mapping):
        raise UnusableQuestion("'tests' is missing; expected an object with 'type' stdin or function")
    if not isinstance(tests.get("preamble", ""), str):
        raise UnusableQuestion("'preamble' of 'tests' must be a string of Python")
    if tests.get("type") == "stdin":
        cases = tests.get("cases")
        if not isinstance(cases, list) or not cases:
            raise UnusableQuestion("'tests' has no 'cases'; expected a list of {\"input\", \"output\"}")
        for number, case in enumerate(cases, start=1):
            if not isinstance(case, Mapping) or not all(isinstance(case.get(k), str) for k in ("input", "output")):
                raise UnusableQuestion(f"case {number} of 'tests' must have the strings 'input' and 'output'")
    elif tests.get("type") == "function":
        code, entry_point = tests.get("code"), tests.get("entry_point")
        if not isinstance(code, str) or not isinstance(entry_point, str) or not entry_point:
            raise UnusableQuestion("function 'tests' must have the strings 'code' and 'entry_point'")
        _check_test_code(code, entry_point)
    else:
        raise UnusableQuestion(f"'type' of 'tests' must be stdin or function, not {tests.get('type')!r}")


def _check_test_code(code: str, entry_point: str) -> None:
    """The tests know the function under test and nothing else of the solution."""
    try:
        tree = ast.parse(code)
        table = symtable.symtable(code, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableQuestion(f"'code' of 'tests' is not valid Python: {error}") from error
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)):
        return
    if not any(isinstance(node, (ast.Assert, ast.Call)) for node in ast.walk(tree)):
        raise UnusableQuestion("'code' of 'tests' tests nothing")
    known = {entry_point.rsplit(".", 1)[-1], "candidate", "__name__", *dir(builtins)}
    known |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used, tables = set(), [table]
    while tables:
        scope = tables.pop()
        tables += scope.get_children()
        known |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned()}
        used |= {s.get_name() for s in scope.get_symbols() if s.is_referenced() and s.is_global()}
    if missing := sorted(used - known):
        raise UnusableQuestion(
            f"the tests use {missing[0]!r}, which they do not define; only {entry_point!r} (also as 'candidate') is "
            "taken from the solution, put helpers into 'code' of 'tests'"
        )


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Run the program of `text` against the tests. Raises SandboxError if the walls fall down on the way."""
    source = extract(text, settings.answer_after)
    if source is None:
        return NO_ANSWER
    limits = Limits(settings.timeout, settings.memory_mb, settings.processor)
    tests = question["tests"]
    answer, source = source, _with_preamble(tests.get("preamble", ""), source)
    if tests["type"] == "function":
        verdict = run_function_tests(source, tests["code"], tests["entry_point"], limits, settings.walls)
        return Judgement(verdict, answer)
    for case in tests["cases"]:
        output, problem = run_program(source, case["input"].encode("utf-8", "replace"), limits, settings.walls)
        if problem is not None:
            return Judgement(problem, answer)
        if not same_output(output.decode("utf-8", "replace"), case["output"]):
            return Judgement("wrong", answer)
    return Judgement("correct", answer)


def _with_preamble(preamble: str, source: str) -> str:
    """What a benchmark gives every solution (imports, helpers), in front; imports from the future stay first."""
    if not preamble:
        return source
    future = re.compile(r"^from __future__ import .*$", re.MULTILINE)
    return "\n".join([*future.findall(source), preamble, future.sub("", source)])


def extract(text: str, answer_after: str | None) -> str | None:
    """The last closed block fenced as Python or as nothing; of a text without a closed one, None."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    return _last_block(part) or (_last_block(text) if answer_after is None else None)


def _last_block(text: str) -> str | None:
    found, opened = None, None
    for fence in _FENCE.finditer(text):
        mark, language = fence[1], fence[2].strip().lower()
        if opened is None:
            opened = (mark, language, fence.end() + 1)
        elif mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and not language:
            if opened[1] in _PYTHON and text[opened[2] : fence.start()].strip():
                found = textwrap.dedent(text[opened[2] : fence.start()])
            opened = None
        elif language in _PYTHON[1:]:  # the block before was never closed
            opened = (mark, language, fence.end() + 1)
    return found


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
