"""Rows of released evaluation sets, and files of them."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import pickle
import zlib

import pytest

from megatron_ssft.datasets.benchmarks import BenchmarkOptions, read_benchmark
from megatron_ssft.errors import UserError

GPQA = {
    "Question": "Which of these is a metal?",
    "Correct Answer": "iron\n",
    "Incorrect Answer 1": "neon",
    "Incorrect Answer 2": " sulphur",
    "Incorrect Answer 3": "argon",
    "Record ID": "rec1",
    "Subdomain": "Inorganic",
    "High-level domain": "Chemistry",
    "Extra Revised Question": "",
}


def pack(text, protocol=4):
    return base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()


def lcb(kind="stdin", packed=True, **fields):
    public = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    hidden = [{"input": "4 5\n", "output": "9\n", "testtype": "stdin"}]
    row = {"starter_code": "", "metadata": "{}"}
    if kind == "functional":
        public = [{"input": '[1, 2]\n"a"', "output": "[1, 2, 1]", "testtype": kind}]
        hidden = [{"input": '[]\n"b\\n"', "output": "[0]", "testtype": kind}]
        starter = "class Solution:\n    def grow(self, xs: List[int], s: str) -> List[int]:\n        "
        row = {"starter_code": starter, "metadata": '{"func_name": "grow"}'}
    return {
        "question_title": "Sums",
        "question_content": "Add them.",
        "platform": "atcoder",
        "question_id": "abc1_a",
        "contest_date": "2024-08-10T00:00:00",
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": pack(json.dumps(hidden)) if packed else json.dumps(hidden),
        **row,
        **fields,
    }


HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": "import math\n\n\ndef twice(x):\n    return 2 * x\n\n\n"
    'def root(x: float):\n    """ The root of\n    twice x."""\n',
    "canonical_solution": "    return helper(x)\n\n\ndef helper(x):\n    return math.sqrt(twice(x))\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3) == math.sqrt(twice(3))\n",
    "entry_point": "root",
}


def save(path, *rows):
    if path.name.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif path.name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
        path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def read(path, name, notes=None, **options):
    """The questions; each is one that the training reader and scoring accept."""
    return list(read_benchmark([path], name, BenchmarkOptions(**options), notes=notes))


def error_of(path, name, **options):
    with pytest.raises(UserError) as caught:
        read(path, name, **options)
    return str(caught.value)
