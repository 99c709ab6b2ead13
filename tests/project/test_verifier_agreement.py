"""benchmarks/verifier_agreement.py: rows of every kind are counted as they are labelled, through the real workers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

TESTS = r"""
import math, pytest

@pytest.mark.parametrize(
    "gold, pred, expected",
    [
        ("$8$", "It is \\boxed{8}.", 1),
        ("$8$", "It is \\boxed{9}.", 1),
        ("$8$", "It is \\boxed{8.0}.", 0),
        # ("$8$", "left out", 1),
    ],
)
def test_one(gold, pred, expected):
    raise SystemExit("it was run")

@pytest.mark.parametrize("gold, pred, strict, expected", [("$u$", "$v$", True, 0), ("$u$", "$v$", False, 1)])
def test_two(gold, pred, strict, expected): ...

@pytest.mark.parametrize("gold, pred, result", [(f"{math.sqrt(3):.12f}", f"$\\sqrt{{3}}$", 1)])
def test_three(gold, pred, result): ...

@pytest.mark.parametrize("pred, config", [("A", None)])
def test_four(pred, config): ...
"""
SOLUTIONS = {"question": "?", "ground_truth": "4+4=8\nA: 8", "small": {"solution": "A: 8", "is_correct": True}}
OUTPUTS = {"answer": "8", "code": [r"\boxed{8}", r"\boxed{3}"], "score": [True, False]}
TRACES = {"answer": "8", "traces": [{"source": "t", "text": r"\boxed{8}", "correct": False}]}
REFERENCE = {"answer": "8", "solution": r"\boxed{8}"}


def agreement(tmp_path, kind, text, *flags):
    file = tmp_path / ("test_pairs.py" if kind == "math-verify" else "rows.jsonl")
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, "benchmarks/verifier_agreement.py", kind, str(file), "--workers", "1", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tests_of_math_verify_are_parsed_and_counted(tmp_path):
    printed = agreement(tmp_path, "math-verify", TESTS)
    assert printed.endswith(
        "math-verify, verifier math: 3 of 5 agree (3 are labelled right); false positives 1, false negatives 1,"
        " unreadable golds 0\n"
    )
    assert "test_pairs.py:8: label right, ours wrong, '9'" in printed
    assert "test_pairs.py:9: label wrong, ours correct, '8.0'" in printed


@pytest.mark.parametrize(
    ("kind", "row", "counts"),
    [
        ("gsm8k", SOLUTIONS, "1 of 1 agree (1 are labelled right); false positives 0"),
        ("qwen-math", OUTPUTS, "2 of 2 agree (1 are labelled right); false positives 0"),
        ("teachers", TRACES, "0 of 1 agree (0 are labelled right); false positives 1"),
        ("math-golds", REFERENCE, "1 of 1 agree (1 are labelled right); false positives 0"),
    ],
)
def test_rows_of_public_files_are_counted(tmp_path, kind, row, counts):
    assert counts in agreement(tmp_path, kind, json.dumps(row) + "\n")


def test_exact_answers_are_compared_too(tmp_path):
    row = {"answer": "8", "solution": r"\boxed{16/2}"}
    assert "verifier exact: 0 of 1 agree" in agreement(tmp_path, "math-golds", json.dumps(row), "--verifier", "exact")
