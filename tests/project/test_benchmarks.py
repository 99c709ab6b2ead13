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
