"""The pool of verifier processes: order, limits, what happens to workers that die; and code end to end."""

from __future__ import annotations

import random
import signal
import time

import pytest

from megatron_ssft.scoring.sandbox import mechanisms
from megatron_ssft.scoring.verifiers import code
from megatron_ssft.scoring.verifiers.common import Settings, UnusableQuestion
from megatron_ssft.scoring.verifiers.workers import VerifierPool
from tests.helpers.math_pairs import SLOW

GARBAGE = {
    "braces": "{" * 1_000_000,
    "open boxes": r"\boxed{" * 100_000,
    "nested boxes": r"\boxed{" * 50_000 + "7" + "}" * 50_000,
    "dollars": "$" * 1_000_000,
    "dollar pairs": "$ $ " * 300_000,
    "answers": "Answer: " * 200_000,
    "final answers": "final answer is " * 100_000,
    "letters": "Answer: A or " * 100_000,
    "hashes": "#" * 1_000_000,
    "spaces": "answer" + " " * 3_000_000 + "x",
    "box and spaces": r"\boxed{1}" + " " * 1_000_000 + r"\boxed{2",
    "fences": "```python\n" * 100_000,
    "backticks": "`" * 1_000_000,
    "equations": "7 = " * 300_000,
    "zeros": "\0" * 1_000_000,
    "half surrogates": "\ud800" * 100_000,
    "noise": "".join(random.Random(0).choices("\\{}[]()$#*^_&%~ 0123456789abcABC\n=+-/.,:é漢", k=300_000)),
}
QUESTION = {
    "answer": "C",
    "tests": {"type": "stdin", "cases": [{"input": "", "output": "7"}]},
}


@pytest.mark.parametrize("verifier", ["exact", "math", "choice", "code"])
def test_any_text_gets_a_verdict_in_time(verifier):
    settings = Settings(timeout=5.0)
    with VerifierPool(verifier, settings, 1) as pool:
        list(pool.check([QUESTION]))  # the process has started
        for name, text in GARBAGE.items():
            began = time.monotonic()
            judgement = next(pool.judge([(text, QUESTION)]))
            assert judgement.verdict in ("wrong", "no answer", "timeout", "memory"), (name, judgement.verdict)
            assert not judgement.correct
            assert time.monotonic() - began < settings.timeout + 6, name


def test_results_keep_their_order_and_slow_tasks_their_limit():
    texts = [SLOW[0][1] if i in (3, 7) else str(i) for i in range(40)]
    rows = [(rf"\boxed{{{text}}}", {"answer": str(i)}) for i, text in enumerate(texts)]
    with VerifierPool("math", Settings(timeout=1.5), 2) as pool:
        verdicts = [judgement.verdict for judgement in pool.judge(rows)]
    assert verdicts == ["timeout" if i in (3, 7) else "correct" for i in range(40)]


@pytest.mark.slow
@pytest.mark.parametrize(("gold", "answer"), SLOW)
def test_slow_mathematics_ends_at_the_limit(gold, answer):
    with VerifierPool("math", Settings(timeout=2.0), 1) as pool:
        list(pool.check([{"answer": "1"}]))
        began = time.monotonic()
        assert not next(pool.judge([(rf"\boxed{{{answer}}}", {"answer": gold})])).correct
        assert time.monotonic() - began < 5
        assert next(pool.judge([(r"\boxed{7}", {"answer": "7"})])).correct


def test_memory_that_runs_out_is_a_verdict():
    text = "#" + "7" * 200_000_000
    with VerifierPool("exact", Settings(timeout=30.0, memory_mb=64), 1) as pool:
        assert next(pool.judge([(text, {"answer": "7"})])).verdict in ("memory", "crash: verifier, exit status 1")
        assert next(pool.judge([("#7", {"answer": "7"})])).correct


def test_a_killed_worker_is_replaced():
    with VerifierPool("exact", Settings(), 1) as pool:
        assert next(pool.judge([("#7", {"answer": "7"})])).correct
        pool._all[0]._process.send_signal(signal.SIGKILL)
        assert next(pool.judge([("#7", {"answer": "7"})])).verdict in ("correct", "crash: verifier, exit status -9")
        assert next(pool.judge([("#7", {"answer": "7"})])).correct


def test_no_process_is_left_behind():
    with VerifierPool("math", Settings(timeout=60.0), 2) as pool:
        assert pool.equal("1/2", "0.5") and not pool.equal("1/2", "0.6")
        list(pool.check([{"answer": "1"}] * 4))
        processes = [worker._process for worker in pool._all]
    assert processes and all(process.poll() is not None for process in processes)


def test_gold_answers_are_checked_in_order():
    with VerifierPool("math", Settings(timeout=10.0), 2) as pool:
        reasons = list(pool.check([{"answer": "1"}, {"answer": "?"}, {}, {"answer": "x"}]))
    assert [reason is None for reason in reasons] == [True, False, False, True]
    assert "cannot be read" in reasons[1] and "missing" in reasons[2]


# ---- code: extraction, comparison, whole programs


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```python\na\n```\ntext\n```python\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\nOutput:\n```text\n7\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("  ```python\n  if a:\n    b\n  ```", "if a:\n  b\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("```python\nlost\n```python\na\n```", "a\n"),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\nthat is it", "a\n"),
        ("```python\nunfinished", None),
        ("```c\nint x;\n```", None),
        ("```python3 title='a.py' linenums=1\na\n```", "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("```{python}\na\n```", "a\n"),
        ("```Python3.11\na\n```", "a\n"),
        ("``` py:solution.py\na\n```", "a\n"),
        ("```python,editable\na\n```\n```pycon\n>>> a\n```", "a\n"),
        ("```pythonic\na\n```", None),
        ("```{code-cell} ipython3\na\n```", "a\n"),
        ("```language-python\na\n```", "a\n"),
        ("```src/main.py\na\n```", "a\n"),
        ("```main.pyx\na\n```", None),
        ("```title='a'\nprint(1)\n```", "print(1)\n"),
        ("```pypy-log\na\n```", None),
        ("```{.line-numbers}\nprint(1)\n```", "print(1)\n"),
        ("```{.text}\nprint(1)\n```", None),
        ("```python\na\n```\nIt prints\n```\n6\n```", "a\n"),
        ("```\n6\n```\n```py\na\n```\n```\nprint(2)\n```", "a\n"),
        ("```\nprint(6)\n```\nOutput:\n```\n6\n```", "print(6)\n"),
        ("```\nprint(6)\n```\nwhich gives\n```\n[1, 2]\nTrue\n```", "print(6)\n"),
        ("```\nn = 1\nprint(n)\n```\n**Sample output**\n```\nn = 1\n```", "n = 1\nprint(n)\n"),
        ("```\nx = int(input()\n```\n```\n3 4 5\n```", "x = int(input()\n"),
        ("A program that reads the input and writes the expected output:\n```\nprint(1)\n```", "print(1)\n"),
        ("<think>\n```python\na\n```\n</think>\nIt prints\n```\n7\n```", "a\n"),
        ("<think>\n```python\na\n```\n</think>\n```\nprint(7)\n```", "a\n"),
        ("print(1)", None),
        ("", None),
    ],
)
def test_code_extraction(text, source):
    assert code.extract(text, None) == source


@pytest.mark.parametrize(
    ("text", "entry_point", "source"),
    [
        ("```python\ndef f(x): pass\n```\nUse it:\n```python\nprint(f(1))\n```", "f", "def f(x): pass\n"),
        ("```python\ndef f(x): pass\n```\nBetter:\n```python\ndef f(x): 1\n```", "f", "def f(x): 1\n"),
        ("```python\ndef f(x): pass\n```\n```python\ndef f_two(x): 1\n```", "f", "def f(x): pass\n"),
        ("```python\ndef f(x): pass\n```\nBetter:\n```python\ndef f(x: 1\n```", "f", "def f(x: 1\n"),
        ("```python\nf = sorted\n```\n```python\nf([1]) == 3\n```", "f", "f = sorted\n"),
        (
            "```python\nclass Solution:\n    x = 1\n    def f(self): pass\n```\n```python\nSolution().f()\n```",
            "f",
            "class Solution:\n    x = 1\n    def f(self): pass\n",
        ),
        ("```python\nclass Box: pass\n```\n```python\nBox().f()\n```", "Box.f", "class Box: pass\n"),
        ("```python\na\n```\n```python\nb\n```", "f", "b\n"),
        ("```\ndef f(x): pass\n```\n```\nf(1)\n```", "f", "def f(x): pass\n"),
    ],
)
def test_code_extraction_of_functions(text, entry_point, source):
    assert code.extract(text, None, entry_point) == source


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("7\n", "7", True),
        (" 7 \n\n", "7\n", True),
        ("1 2\n3", "1 2\n3\n", True),
        ("1.0", "1", True),
        ("0.10 2", "0.1 2.0", True),
        ("YES", "yes", False),
        ("1 2", "1\n2", False),
        ("1 2 3", "1 2", False),
        ("", "7", False),
        ("nan", "1", False),
        ("a 1.0", "a 1", False),
        ("1e999999999", "1", False),
        ("", "", True),
    ],
)
def test_output_comparison(output, expected, same):
    assert code.same_output(output, expected) is same
    if same:
        assert code.same_output(output, expected, 1e-6)


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("0.333333", "0.3333333333", 1e-6, True),
        ("0.333333", "0.3333333333", 1e-8, False),
        ("1000000.5 x", "1000000.6 x", 1e-6, False),
        ("1000000.5 2", "1000000.6 2", 1e-6, True),
        ("4.9999999", "5", 1e-6, True),
        ("1e10", "10000000001", 1e-6, True),
        ("1000000001", "1000000000", 1e-6, False),
        ("7", "8", 0.5, False),
        ("nan", "1.0", 0.5, False),
        ("nan", "nan", 0.5, True),
        ("inf", "1.0", 0.5, False),
        ("-0.0000001", "0.0", 1e-6, True),
        ("1.0 2.0", "1.0", 0.5, False),
        ("1e999999999", "1.5", 0.5, False),
    ],
)
def test_output_comparison_with_a_tolerance(output, expected, tolerance, same):
    assert code.same_output(output, expected, tolerance) is same


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (None, "missing"),
        ({"type": "stdin", "cases": []}, "no 'cases'"),
        ({"type": "stdin", "cases": [{"input": "1"}]}, "case 1"),
        ({"type": "other"}, "'other'"),
        ({"type": "function", "code": "assert f(1)"}, "entry_point"),
        ({"type": "function", "code": "assert f(", "entry_point": "f"}, "not valid Python"),
        ({"type": "function", "code": "assert f(1)", "entry_point": "f g"}, "must name a function"),
        ({"type": "function", "code": "x = 1", "entry_point": "f"}, "tests nothing"),
        ({"type": "function", "code": "assert helper(f(1))", "entry_point": "f"}, "'helper'"),
    ],
)
def test_unusable_tests_are_refused(tests, reason):
    with pytest.raises(UnusableQuestion, match=reason):
        code.check_question({"tests": tests})


def test_usable_tests_are_accepted():
    for tests in (
        "import math\ndef helper(x): return math.floor(x)\nassert helper(f(1)) == [i for i in range(2)][1]",
        "def check(candidate):\n    global g\n    g = 1\n    assert candidate(g) == 1 and print is not None",
        "from math import *\nassert f(pi) > 3",
        "class T:\n    def run(self):\n        assert f(1)\nT().run()",
    ):
        code.check_question({"tests": {"type": "function", "code": tests, "entry_point": "f"}})


def test_programs_are_judged_by_all_cases():
    cases = [{"input": f"{i} {i}\n", "output": f"{2 * i}\n"} for i in range(3)]
    question = {"tests": {"type": "stdin", "cases": cases}}
    right = "```python\nprint(sum(map(int, input().split())))\n```"
    late = "```python\na, b = map(int, input().split())\nprint(a + b if a < 2 else 0)\n```"
    function = {"tests": {"type": "function", "code": "assert f(2) == 4", "entry_point": "f"}}
    rows = [
        (right, question),
        (late, question),
        ("```python\n1 / 0\n```", question),
        ("I do not know", question),
        ("```python\ndef f(x): return 2 * x\n```", function),
        ("```python\ndef f(x): return x\n```", function),
    ]
    with VerifierPool("code", Settings(mechanism=mechanisms.choose()), 2) as pool:
        verdicts = [judgement.verdict for judgement in pool.judge(rows)]
    assert verdicts == ["correct", "wrong", "crash: ZeroDivisionError", "no answer", "correct", "wrong"]


def test_long_integers_are_read_and_written():
    """Python's own limit is 4,300 digits."""
    question = {"tests": {"type": "stdin", "cases": [{"input": f"{10**4000}\n" * 2, "output": "1" + "0" * 8000}]}}
    text = "```python\nimport math\nprint(math.prod([int(input()), int(input())]))\n```"
    assert code.judge(text, question, Settings(timeout=30.0)).verdict == "correct"
    assert code.judge(text.replace("math.prod", "max"), question, Settings(timeout=30.0)).verdict == "wrong"
    tests = {"type": "function", "code": f"assert f(1{'0' * 5000}) == 1{'0' * 4999}1", "entry_point": "f"}
    code.check_question({"tests": tests})
    for body, verdict in (("x + 1", "correct"), ("x", "wrong")):
        text = f"```python\ndef f(x): return {body}\n```"
        assert code.judge(text, {"tests": tests}, Settings(timeout=30.0)).verdict == verdict
