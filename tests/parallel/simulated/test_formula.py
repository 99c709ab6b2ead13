"""The formula beside the simulation: Megatron-LM's report, worked out by hand for Qwen2.5-32B."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

GIB, H, FFN, LAYERS, VOCAB = 2**30, 5120, 27648, 64, 152064


@pytest.fixture(scope="module")
def formulas():
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "simulated_step.py"), "--formulas"]
    rows = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {row: [size * GIB for size in sizes] for row, sizes in rows.items()}


@pytest.mark.slow
def test_state_is_bytes_per_parameter(formulas):
    layer = H * (5120 + 2 * 1024) + 5120 * H + 3 * H * FFN + 2 * H
    assert formulas["32b-pp4-first"][0] == pytest.approx(((LAYERS * layer + H) / 4 + H * VOCAB) / 8 * (6 + 12 / 2))
    assert formulas["32b-pp1"][0] == pytest.approx((LAYERS * layer + H + 2 * H * VOCAB) / 8 * (6 + 12 / 8))


@pytest.mark.slow
def test_activations_are_those_of_the_stages_in_flight(formulas):
    kept = {row: (peak - state) * 8 for row, (state, peak) in formulas.items() if row.startswith("32b")}
    tokens = kept["32b-pp4-first"] / (LAYERS * 2 * H + 4 * (8 + H))  # four stages, and at least four microbatches
    assert tokens == pytest.approx(round(tokens), abs=1e-3) and 16384 < tokens <= 32768
    assert kept["32b-no-recompute"] == pytest.approx(tokens * (LAYERS * (18 * H + 4 * FFN) + 4 * (8 + H)))
    tokens = kept["32b-pp1"] / (LAYERS * 2 * H + 8 + H + 4 * (H + VOCAB))  # the logits of all tokens, in float32
    assert tokens == pytest.approx(round(tokens), abs=1e-3) and 16384 < tokens <= 32768
