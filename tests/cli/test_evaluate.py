"""`evaluate` as a user starts it: its files, its tables, what it refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from megatron_ssft.formats.rollouts import write_scored
from tests.helpers.paths import ROOT
from tests.helpers.scored_rows import question, scored


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    rng = random.Random(0)
    for name, tags, per_tag in (("tagged", 6, 11), ("mixed", 1, 66)):
        rows = []
        for q in range(8):
            rows += question(f"q{q}", *["".join(rng.choice("1123-") for _ in range(per_tag)) for _ in range(tags)])
        write_scored(folder / f"{name}.jsonl", rows)
    (folder / "q.jsonl").write_text("".join(f'{{"id": "q{q}", "op": "o{q % 2}"}}\n' for q in range(8)))
    return folder


def test_the_tool_writes_its_files_and_prints_tables_that_fit(files, tmp_path):
    out = tmp_path / "new" / "eval"
    done = run_tool(
        files / "tagged.jsonl", files / "mixed.jsonl", "--output", out, "--group-by", "op", "--data", files / "q.jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100
    record = json.loads((out / "evaluation.json").read_text())
    assert [run["name"] for run in record["runs"]] == ["tagged", "mixed"]
    figure = record["runs"][0]["ours"]["native_cons"]
    shown = f"{figure['value']:.3f} ±{figure['stderr']:.3f}"
    tables = (out / "tables.md").read_text()
    assert shown in done.stdout and shown in tables
    for section in tables.split("## ")[1:]:
        assert "ours:" in section or "published:" in section or "either rule" in section or "compared as" in section
        widths = {line.count("|") for line in section.splitlines() if line.startswith("|")}
        assert len(widths) == 1 and "<" not in section


def test_the_tool_compares_answers_mathematically(files, tmp_path):
    pytest.importorskip("math_verify")
    rows = question("a", "3", "3") + [
        scored("a", 2 + s, 0, a, gold=a) for s, a in enumerate(["2\\sqrt{2}", "\\sqrt{8}", "\\sqrt{2}\\cdot 2"])
    ]
    write_scored(tmp_path / "s.jsonl", rows)
    done = run_tool(tmp_path / "s.jsonl", "--output", tmp_path, "--answers", "math")
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "evaluation.json").read_text())["runs"]
    assert run["ours"]["native_cons"]["value"] == 1 and run["published"]["native_cons"]["value"] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--k", "0"], "--k 0: must be at least 1"),
        (["--group-by", "op"], "go together"),
        (["--k", "1", "67"], "--k 67: no question has more than 66 samples; the largest possible k is 66"),
        (["--pass-tag", "7"], "--pass-tag 7: tags in use are 0"),
        (["--pass-tag", "-1"], "--pass-tag -1: tags in use are 0"),
    ],
)
def test_wrong_arguments_end_in_one_line(files, tmp_path, arguments, reason):
    done = run_tool(files / "mixed.jsonl", "--output", tmp_path, *arguments)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_wrong_files_end_in_one_line(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    done = run_tool(files / "mixed.jsonl", tmp_path / "empty.jsonl", "--output", tmp_path / "out")
    assert (
        done.returncode == 2
        and done.stderr == f"{tmp_path}/empty.jsonl:1: the file is empty; expected one JSON object a line\n"
    )
    assert not (tmp_path / "out").exists()
    done = run_tool(files / "mixed.jsonl", "--output", tmp_path / "empty.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_tool_prints_and_writes_what_is_incomplete(tmp_path):
    write_scored(tmp_path / "s.jsonl", [*question("a", "11", "12"), *question("b", "1", "12")])
    done = run_tool(tmp_path / "s.jsonl", "--output", tmp_path)
    line = "incomplete: 1 question lacks samples under some tag; pooled figures are biased"
    assert done.stdout.count(line) == 1 and (tmp_path / "tables.md").read_text().count(line) == 1


def test_a_tag_for_pass_at_1_must_be_in_use(files, tmp_path):
    own = [scored("q0", s, s, "1", mode="own") for s in range(2)]
    write_scored(tmp_path / "own.jsonl", own)
    for names, tag, said in (
        ([files / "tagged.jsonl"], 7, "--pass-tag 7: tags in use are 0 to 5\n"),
        ([files / "tagged.jsonl", files / "mixed.jsonl"], 6, "--pass-tag 6: tags in use in tagged are 0 to 5\n"),
        ([files / "tagged.jsonl", files / "mixed.jsonl"], 5, ""),
        ([tmp_path / "own.jsonl"], 7, ""),
    ):
        done = run_tool(*names, "--output", tmp_path / "out", "--protocol", "published", "--pass-tag", tag)
        assert (done.stderr, done.returncode) == (said, 2 if said else 0)
