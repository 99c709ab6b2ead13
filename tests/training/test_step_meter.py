"""What a step took: parts that add up, memory, and the slow rank by its name, on every parallel layout."""

from __future__ import annotations

import json
import socket
import time

import pytest

from megatron_ssft.formats.metrics import load_metrics
from megatron_ssft.parallel.step_clock import PARTS
from tests.helpers.captured import run_captured
from tests.helpers.distributed import run_ranks
from tests.helpers.fault_points import command_main
from tests.helpers.policy_programs import ANCHOR, run_body
from tests.helpers.policy_programs import flags as policy_flags
from tests.helpers.struck_ranks import slow_down
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows

SSFT_PARTS = [f"{name}_seconds" for name in (*PARTS, "matching")]
STEPS = 8


def _train(words, slow_rank=None, place="training", seconds=0.0):
    """(status, stdout, seconds) of `train` on this rank."""
    import os

    if os.environ["RANK"] == str(slow_rank):
        slow_down(place, seconds)
    begin = time.perf_counter()
    status, out, err = run_captured(command_main("train", words))
    assert status == 0, err
    return status, out, time.perf_counter() - begin


def _run(folder, ranks, values, *slow):
    data = write_rows(folder / "train.jsonl", make_rows())
    run = folder / "run"
    words = flags(BASE | {"data_path": data, "save": run, "train_iters": STEPS} | values)
    results = run_ranks(ranks, _train, words, *slow)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, results[0][1], results[0][2], run


def test_parts_add_up_and_memory_is_that_of_the_process(tmp_path):
    values = {
        "save_interval": 2,
        "eval_data_path": write_rows(tmp_path / "eval.jsonl", make_rows(6)),
        "eval_interval": 3,
    }
    rows, out, seconds, run = _run(tmp_path, 1, values)
    for row in rows:
        assert sum(row[part] for part in SSFT_PARTS) == pytest.approx(row["wall_seconds"], abs=1e-9)
        for part in ("data", "matching", "forward_backward", "optimizer"):
            assert row[f"{part}_seconds"] > 0, part
        assert row["seconds"] <= row["wall_seconds"]
        assert 1e8 < row["rss_bytes"] <= row["peak_rss_bytes"] < 1e11
        assert "slowest_rank" not in row and "peak_allocated_bytes" not in row
    assert sum(row["wall_seconds"] for row in rows) < seconds
    # A save stands in the line of the step after it, an evaluation in its own.
    after_save = [row["save_seconds"] for row in rows if row["iteration"] in (3, 5, 7)]
    assert min(after_save) > max(row["save_seconds"] for row in rows if row["iteration"] not in (3, 5, 7))
    evaluated = [row["evaluation_seconds"] for row in rows if "eval_loss" in row]
    assert len(evaluated) == 3 and min(evaluated) > max(
        row["evaluation_seconds"] for row in rows if "eval_loss" not in row
    )
    assert "slow" not in out
    assert (load_metrics(run)["peak_rss_bytes"] > 1e8).all()


LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 x DP2": (4, {"tensor_model_parallel_size": 2}),
    "PP2 x DP2": (4, {"pipeline_model_parallel_size": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["scoring", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planted_slow_rank_is_the_one_named(tmp_path, layout, place):
    """`scoring` is slow in forward passes, `training` between gradients and the optimizer's step."""
    ranks, values = LAYOUTS[layout]
    slow = ranks - 1
    seconds = 0.8  # more than a step of the others takes, on a busy machine too
    rows, out, _, _ = _run(tmp_path, ranks, values, slow, place, seconds)
    for row in rows[1:]:
        assert row["slowest_rank"] == slow, row
        assert row["slowest_host"] == socket.gethostname()
        assert row["slowest_work_seconds"] > seconds > row["median_work_seconds"]
        assert sum(row[part] for part in SSFT_PARTS) == pytest.approx(row["wall_seconds"], abs=1e-9)
    named = [line for line in out.splitlines() if line.startswith("slow: ")]
    assert len(named) == 1 and named[0].startswith(f"slow: rank {slow} on {socket.gethostname()} ")


POLICIES = {
    "GFPO": (ANCHOR, {"scoring", "evaluation"}),
    "GRPO": (("--objective", "grpo"), {"evaluation"}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_parts_of_policy_learning(models, inputs, tmp_path, name):
    more, expected = POLICIES[name]
    run = tmp_path / "run"
    run_ranks(1, run_body, policy_flags(models, inputs, run, *more, steps=6))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = [f"{part}_seconds" for part in {*PARTS, *expected}]
    for row in rows:
        assert sum(row[part] for part in parts) == pytest.approx(row["wall_seconds"], abs=1e-9)
        assert row["forward_backward_seconds"] > 0 and row["optimizer_seconds"] > 0
        assert ("scoring_seconds" in row) == ("scoring" in expected)
        assert all(row[f"{part}_seconds"] > 0 for part in expected)
