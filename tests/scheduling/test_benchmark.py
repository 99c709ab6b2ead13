"""The scheduling benchmarks print tables, write their figures, and refuse bad arguments."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def run_benchmark(*arguments, name="scheduling.py"):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_benchmark_prints_a_table_and_writes_its_figures(tmp_path):
    done = run_benchmark("--repeats", 2, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["workloads"]) == 4
    for workload in figures["workloads"]:
        of = workload["schedulers"]
        for name, values in of.items():
            assert {"pad_over_bound", "makespan_over_bound", "planning_ms"} <= values.keys()
            assert name in done.stdout and values["makespan_over_bound"] >= 1 and values["pad_over_bound"] >= 1
        assert of["token_budget"]["pad_over_bound"] == of["padded"]["pad_over_bound"] == 1
        assert of["token_budget"]["makespan_over_bound"] < of["per_question"]["makespan_over_bound"]


@pytest.mark.parametrize(
    "arguments", [("--repeats", 0), ("--sigma", "x"), ("--seed", -1), ("--json", "/no/such/folder/x.json")]
)
def test_benchmark_refuses_bad_arguments_in_a_line(arguments):
    done = run_benchmark(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"scheduling.py: error: argument {arguments[0]}:")


def test_benchmark_measures_the_exact_search(tmp_path):
    done = run_benchmark("--search", 60, "--seed", 1, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["search"]
    assert len(figures) == 2
    for name, values in figures.items():
        assert name in done.stdout and values["uncertain"] == 0
        assert 0 <= values["fewer_pads"] + values["certified"] <= 60


@pytest.mark.parametrize("chunks", [1, 2])
def test_pipeline_benchmark_prints_tables_and_writes_its_figures(tmp_path, chunks):
    file = tmp_path / "figures.json"
    done = run_benchmark("--repeats", 2, "--chunks", chunks, "--json", file, name="pipeline.py")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    layouts = json.loads(file.read_text())["layouts"]
    assert [(of["stages"], of["ranks"]) for of in layouts] == [(p, r) for p in (2, 4, 8) for r in (1, 2, 4, 8)]
    for layout in layouts:
        for name in ("training", "cost pass"):
            of = layout[name]
            assert 0 < of["idle"] < 1 and 0 < of["bound"] <= 1 and of["time"] < 1.02
        assert layout["training"]["idle"] <= layout["training"]["idle_before"]
        assert 0 <= layout["training"]["repeated"] < 0.02


def test_pipeline_benchmark_refuses_bad_arguments():
    done = run_benchmark("--chunks", 0, name="pipeline.py")
    assert done.returncode == 2 and "1 or more" in done.stderr.splitlines()[-1]
