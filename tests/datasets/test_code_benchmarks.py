"""Programming problems: their questions, and tests that the code verifier runs."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.datasets.benchmarks import BenchmarkOptions, write_benchmark
from megatron_ssft.errors import UserError
from megatron_ssft.scoring.verifiers import code
from megatron_ssft.scoring.verifiers.common import Settings
from tests.helpers.benchmark_rows import HUMANEVAL, error_of, lcb, read, save


def test_livecodebench_programs(tmp_path):
    for packed in (True, False):
        (row,) = read(save(tmp_path / "a.jsonl", lcb(packed=packed)), "livecodebench")
        assert row["tests"]["cases"] == [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5\n", "output": "9\n"}]
        code.check_question(row)
    assert (row["id"], row["difficulty"], row["platform"]) == ("livecodebench-abc1_a", "easy", "atcoder")
    assert "# YOUR CODE HERE" in row["question"] and "stdin" in row["question"] and "Add them." in row["question"]


def test_livecodebench_functions(tmp_path):
    (row,) = read(save(tmp_path / "a.jsonl", lcb("functional")), "livecodebench")
    tests = row["tests"]
    code.check_question(row)
    assert tests["entry_point"] == "grow" and "def grow(self" in row["question"] and "stdin" not in row["question"]

    def run(body):
        """As the release does: the preamble, the solution, a call for each test."""
        names = {}
        exec(
            f"{tests['preamble']}\nclass Solution:\n    def grow(self, xs: List[int], s: str) -> List[int]:\n{body}",
            names,
        )
        exec(tests["code"], {"candidate": names["Solution"]().grow})

    run("        return xs + [int(s == 'a')]")
    run("        return tuple(xs) + (Counter(s)['a'],)")
    for wrong in ("        return xs", "        return xs + [1]", "        return str(xs)"):
        with pytest.raises(AssertionError):
            run(wrong)


def test_livecodebench_functions_take_and_return_long_integers(tmp_path):
    """4,300 digits are Python's own limit."""
    case = {"input": f'1{"0" * 5000}\n"a"', "output": f"1{'0' * 4999}1", "testtype": "functional"}
    row = lcb("functional", public_test_cases=json.dumps([case]), private_test_cases="[]")
    (question,) = read(save(tmp_path / "a.jsonl", row), "livecodebench")
    code.check_question(question)
    for body, verdict in (("xs + 1", "correct"), ("xs", "wrong")):
        text = f"```python\nclass Solution:\n    def grow(self, xs, s):\n        return {body}\n```"
        assert code.judge(text, question, Settings(timeout=30.0)).verdict == verdict


def test_livecodebench_dates(tmp_path):
    dates = ("2024-07-31", "2024-08-01", "2025-02-01", "2025-02-02")
    path = save(tmp_path / "a.jsonl", *(lcb(question_id=d, contest_date=f"{d}T23:00:00") for d in dates))
    ids = [r["id"] for r in read(path, "livecodebench", since="2024-08-01", until="2025-02-01")]
    assert ids == ["livecodebench-2024-08-01", "livecodebench-2025-02-01"]
    assert len(read(path, "livecodebench", until="2024-07-31")) == 1 and len(read(path, "livecodebench")) == 4
    with pytest.raises(UserError, match="no question is left"):
        write_benchmark([path], tmp_path / "q", "livecodebench", BenchmarkOptions(since="2030-01-01"))
    with pytest.raises(UserError, match="gsm8k has no contest dates"):
        write_benchmark([path], tmp_path / "q", "gsm8k", BenchmarkOptions(since="2030-01-01"))
    assert not (tmp_path / "q").exists()
    undated = save(tmp_path / "b.jsonl", lcb(contest_date=None))
    assert "'contest_date' is missing" in error_of(undated, "livecodebench", since="2024-08-01")
    assert len(read(undated, "livecodebench")) == 1


def test_humaneval_takes_the_prompt_s_helpers_to_tests_and_solution_alone(tmp_path):
    for row in (HUMANEVAL, {**HUMANEVAL, "canonical_solution": None}):
        (got,) = read(save(tmp_path / "a.jsonl", row), "humaneval")
        code.check_question(got)
        assert got["id"] == "HumanEval/900" and HUMANEVAL["prompt"].strip() in got["question"]
        assert "return math" not in json.dumps(got) and "helper" not in json.dumps(got)
        names = {}
        exec(got["tests"]["preamble"] + "def root(x): return math.sqrt(twice(x))", names)
        exec(got["tests"]["code"], {"candidate": names["root"]})
        with pytest.raises(AssertionError):
            exec(got["tests"]["code"], {"candidate": lambda x: x})


JUDGED = {
    "humaneval": (HUMANEVAL, "import math\ndef root(x):\n    return math.sqrt(2 * x)", "def root(x):\n    return x"),
    "livecodebench": (lcb(), "a, b = map(int, input().split())\nprint(a + b)", "print(3)"),
    "livecodebench functions": (
        lcb("functional"),
        "class Solution:\n    def grow(self, xs, s):\n        return xs + [int(s == 'a')]",
        "class Solution:\n    def grow(self, xs, s):\n        return xs + [1]",
    ),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_code_verifier_judges_by_the_rows(tmp_path, name):
    row, right, wrong = JUDGED[name]
    (question,) = read(save(tmp_path / "a.jsonl", row), name.split()[0])
    for source, verdict in ((right, "correct"), (wrong, "wrong")):
        assert code.judge(f"So:\n```python\n{source}\n```", question, Settings(timeout=30.0)).verdict == verdict
