"""Tests of functions: sets of every usual form run and prove something, or are refused."""

from __future__ import annotations

import pytest

from megatron_ssft.scoring.sandbox.function_tests import run_function_tests
from megatron_ssft.scoring.sandbox.programs import Limits
from megatron_ssft.scoring.verifiers import code
from megatron_ssft.scoring.verifiers.common import UnusableQuestion
from tests.helpers.function_test_sets import LENIENT, PRINTS, RIGHT, SETS, UNUSABLE, WRONG

ABSENT = {"no Python": "this is not Python (", "another name": "def sort(x):\n    return sorted(x)", "blank": "\n"}


def verdict_of(source: str, tests: str, entry_point: str = "order") -> str:
    code.check_question({"tests": {"type": "function", "code": tests, "entry_point": entry_point}})
    return run_function_tests(source, tests, entry_point, Limits(seconds=30.0), None)


@pytest.mark.parametrize("name", SETS)
def test_sets_tell_right_from_wrong(name):
    assert verdict_of(RIGHT, SETS[name]) == "correct"
    assert verdict_of(WRONG, SETS[name]) == "wrong"
    assert verdict_of(ABSENT["no Python"], SETS[name]) == "crash: SyntaxError"


@pytest.mark.parametrize("name", PRINTS)
def test_sets_see_what_the_function_prints(name):
    assert verdict_of("def show(x):\n    print(x)", PRINTS[name], "show") == "correct"
    assert verdict_of("def show(x):\n    print(x + 1)", PRINTS[name], "show") == "wrong"
    assert verdict_of("def show(x):\n    return x", PRINTS[name], "show") == "wrong"


@pytest.mark.parametrize("absence", ABSENT)
@pytest.mark.parametrize("name", LENIENT)
def test_no_tests_are_passed_by_a_solution_that_is_not_there(name, absence):
    assert verdict_of(ABSENT[absence], LENIENT[name]).startswith("crash: ")


@pytest.mark.parametrize("name", LENIENT)
def test_tests_of_exceptions_are_passed(name):
    assert verdict_of(RIGHT, LENIENT[name]) == "correct"


@pytest.mark.parametrize("name", UNUSABLE)
def test_tests_that_prove_nothing_are_refused(name):
    tests, reason = UNUSABLE[name]
    with pytest.raises(UnusableQuestion, match=reason):
        code.check_question({"tests": {"type": "function", "code": tests, "entry_point": "order"}})
