"""The benchmarks run, on a toy, and write their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_rehearsal_of_the_gpu_benchmark(tmp_path):
    """It goes through the cost pass, the layouts and the matching overhead of the other benchmarks too."""
    done = run("benchmarks/gpu.py", "--rehearse", "--rounds", 1, "--json", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    figures = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "figures").iterdir()}
    assert set(figures) == {"kernels", "cost_pass", "layouts", "utilisation", "matching_overhead"}
    for row in figures["cost_pass"]:
        assert row["FLOP_ratio"] > 1 and row["largest_difference"] < 1e-5
    losses = [row["loss"] for row in figures["layouts"]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    padded, packed = figures["layouts"][3], figures["layouts"][0]
    assert padded["tokens_computed"] > padded["tokens_in_sequences"] > packed["tokens_computed"]
    assert figures["matching_overhead"][0]["bound"] > 1


def test_without_a_gpu_it_says_so():
    if run("-c", "import torch, sys; sys.exit(torch.cuda.is_available())").returncode:
        pytest.skip("there is a GPU")
    done = run("benchmarks/gpu.py")
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_without_signal_the_choice_stays(tmp_path):
    """The gradient of log(mass), on the same toy, drives it into one tag."""
    done = run("benchmarks/gfpo_signal.py", "--seeds", 1, "--shares", "none", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    runs = {row["form"]: row["runs"][0] for row in json.loads((tmp_path / "figures.json").read_text())}
    assert {run["entropy before"] for run in runs.values()} == {runs["plain"]["entropy before"]}
    assert runs["gradient of log(mass)"]["entropy after"] < 0.1 < 1.0 < runs["plain"]["entropy before"]
    for form in ("plain", "natural", "natural, entropy .02"):
        assert abs(runs[form]["entropy after"] - runs[form]["entropy before"]) < 0.1
        assert abs(runs[form]["reward after"] - runs[form]["reward before"]) < 0.02
        assert runs[form]["mass before"] < 0.05 and runs[form]["mass after"] > 0.95
