"""`--dry-run --world-size` and `--advise` from the command line: tables, JSON, refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_ssft.booking.advise import SIMULATED
from megatron_ssft.booking.memory import UNSEEN_BYTES, UNSEEN_SHARE
from megatron_ssft.config.gpus import GPUS
from tests.helpers.bookings import GPU_RUN
from tests.helpers.paths import ROOT
from tests.helpers.simulated_steps import VALUES, write_sets

pytestmark = pytest.mark.slow


def words_of(values):
    """Command line of these values."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def dry_run(folder, *words, program="train", **changes):
    """(status, output, errors) of a dry run of a small model."""
    values = VALUES | write_sets(folder, 24) | GPU_RUN | changes
    command = [sys.executable, "-m", "megatron_ssft.cli", program, *words_of(values), "--dry-run", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """(lines, JSON) of a job of two stages."""
    folder = tmp_path_factory.mktemp("answer")
    changes = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    words = ["--world-size", "8", "--gpu", "H100-80GB", "--nodes-of", "4", "--json", str(folder / "b.json")]
    status, out, err = dry_run(folder, *words, **changes)
    assert (status, err) == (0, "")
    return out.splitlines(), json.loads((folder / "b.json").read_text())


def test_it_describes_the_job_of_that_size(answer):
    lines, _ = answer
    assert "ranks: 8, data-parallel 2" in lines
    assert "# the job: 8 x H100-80GB, tensor 2 x pipeline 2 x context 1 x data 2" in lines


def test_memory_adds_up(answer):
    lines, figures = answer
    assert [memory["stage"] for memory in figures["memory"]] == [0, 1]
    for memory in figures["memory"]:
        assert sum(memory["parts"].values()) == memory["peak"]
        assert memory["needed"] == int(memory["peak"] * (1 + UNSEEN_SHARE)) + UNSEEN_BYTES
        assert memory["margin"] == GPUS["H100-80GB"].bytes - memory["needed"] > 0
        assert memory["between_steps"] <= memory["peak"]
    assert figures["fits"] is True
    (head,) = [line for line in lines if line.startswith("stage ")]
    assert head.split()[:4] == ["stage", "weights", "gradients", "optimizer"] and head.split()[-1] == "free"


def test_time_adds_up(answer):
    _, figures = answer
    time, run = figures["time"], figures["run"]
    total = sum(time.values())
    assert time["waiting"] > 0 and time["pipeline"] > 0 and time["tensor"] > 0 and time["data"] > 0
    assert run["hours"] == pytest.approx(total * run["steps"] / 3600)
    assert run["hours_least"] < run["hours"] < run["hours_most"]
    assert run["gpu_hours"] == pytest.approx(8 * run["hours"])
    assert run["tokens_per_second"] == pytest.approx(figures["average"]["tokens"] / total)
    assert 0 < run["mfu"] < figures["attainable_share"]


def test_the_messages_between_stages_leave_the_node(answer):
    _, figures = answer
    assert figures["messages"]["between_nodes"] > 0 and figures["messages"]["inside_nodes"] > 0


def test_without_a_gpu_bytes_and_flops_are_told(tmp_path):
    status, out, err = dry_run(tmp_path, "--world-size", "2", "--json", str(tmp_path / "b.json"))
    assert (status, err) == (0, "")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["time"] is figures["run"] is figures["longest_that_fits"] is None
    assert figures["memory"][0]["margin"] is None
    assert "free" not in next(line for line in out.splitlines() if line.startswith("stage "))


@pytest.mark.parametrize(
    ("words", "changes", "reason"),
    [
        (["--world-size", "3"], {"tensor_model_parallel_size": 2}, "3 processes cannot be arranged: tensor 2"),
        (["--world-size", "8", "--gpu", "H200"], {"bf16": False}, "--gpu H200: is known for bfloat16 alone"),
        (["--world-size", "2", "--json", "/nowhere/b.json"], {}, "--json /nowhere/b.json: there is no folder"),
        (
            ["--world-size", "2"],
            {"transformer_impl": "transformer_engine"},
            "--transformer-impl transformer_engine: ",
        ),
    ],
)
def test_refusals_are_one_line(tmp_path, words, changes, reason):
    status, _, err = dry_run(tmp_path, *words, **changes)
    assert status == 2 and err.startswith(reason) and err.count("\n") == 1


def test_advice(tmp_path):
    words = ["--world-size", "8", "--gpu", "H100-80GB", "--advise", "--json", str(tmp_path / "a.json")]
    status, out, err = dry_run(tmp_path, *words)
    assert (status, err) == (0, "")
    lines, layouts = out.splitlines(), json.loads((tmp_path / "a.json").read_text())["layouts"]
    (head,) = [number for number, line in enumerate(lines) if line.startswith("layout ")]
    assert lines[head - 1].startswith("# layouts of 8 x H100-80GB, the best first: ")
    assert len(layouts) == len([line for line in lines[head + 1 :] if line.startswith("TP")])
    times = [sum(layout["time"].values()) for layout in layouts]
    assert all(layout["fits"] for layout in layouts) and times == sorted(times)
    assert len([layout for layout in layouts if layout["by"] == "simulation"]) == SIMULATED
    for layout in layouts:
        sizes = layout["layout"]
        assert sizes["tensor"] * sizes["pipeline"] * sizes["data"] == 8
    # A model of this size needs no other ranks to hold a layer, and messages cost more than they save.
    assert layouts[0]["layout"]["tensor"] == 1
    flags = [line.strip() for line in lines if line.startswith("   --tensor-model-parallel-size")]
    assert flags[0] == layouts[0]["flags"] and len(flags) == SIMULATED
    # The flags are a run of this program.
    status, again, err = dry_run(tmp_path, "--world-size", "8", *flags[1].split())
    assert (status, err) == (0, "")
    sizes = layouts[1]["layout"]
    assert f"# the job: 8 GPUs, tensor {sizes['tensor']} x pipeline {sizes['pipeline']} x context 1" in again


def test_the_fewest_gpus_are_found(tmp_path):
    status, out, err = dry_run(tmp_path, "--gpu", "H100-80GB", "--advise")
    assert (status, err) == (0, "")
    assert "# layouts of 1 x H100-80GB, the best first: " in out
