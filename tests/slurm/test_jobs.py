"""The shipped batch scripts under a real SLURM, with the real trainer on the CPU."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.helpers.training_runs import logs
from tests.slurm.conftest import ONE_NODE, SAVED_EVERY, STEPS, TWO_NODES
from tests.slurm.troubled_python import write_interpreter

pytestmark = pytest.mark.slow

LEARNING_RATE = 2e-3
"""Given on the command line of every job; the recipe has another."""
ARGUMENTS = ("--lr", str(LEARNING_RATE))


def results(run_dir: Path) -> tuple:
    """What a finished run leaves: exported weights, metrics and assignments."""
    export = run_dir / f"iter_{STEPS:07d}" / "hf"
    return *((path.name, path.read_bytes()) for path in sorted(export.glob("*.safetensors"))), logs(run_dir)


def attempts(run_dir: Path) -> list[str]:
    """First words of the lines that tell of a job's attempts, in their order."""
    (record,) = (run_dir / "slurm").glob("attempts-*")
    return [line.split()[0] for line in record.read_text().splitlines()]


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """Variables that make a job's Python troubled."""
    program = write_interpreter(tmp_path_factory.mktemp("troubled"))
    return lambda **trouble: {"PYTHON": program, **trouble}


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, inputs, troubled, tmp_path_factory):
    """Two jobs that run into a time limit of two minutes, beside the other ones: (id, RUN_DIR) by name."""
    folder = tmp_path_factory.mktemp("limited")
    limit = ("--time=2", "--signal=B:USR1@30")  # SLURM sends it up to 30 seconds earlier
    troubles = {
        "stopped": {"STEP_SECONDS": 9},
        "too slow": {"STEP_SECONDS": 9, "HANG_ONCE": folder / "hung", "STOP_MARGIN": 8},
    }
    jobs = {}
    for name, trouble in troubles.items():
        run_dir = folder / name
        environment = inputs.environment(run_dir, **troubled(**trouble))
        jobs[name] = (
            cluster.submit("single_node.sbatch", *ARGUMENTS, options=(*ONE_NODE, *limit), **environment),
            run_dir,
        )
    return jobs


@pytest.fixture(scope="module")
def whole(cluster, inputs, tmp_path_factory):
    """RUN_DIR of a job of two nodes that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run with space"
    job = cluster.submit("multi_node.sbatch", *ARGUMENTS, options=TWO_NODES, **inputs.environment(run_dir))
    assert cluster.end_of(job)["JobState"] == "COMPLETED", cluster.output(job)
    return run_dir


def test_a_job_of_two_nodes_trains_and_exports(whole):
    assert attempts(whole) == ["begin", "finished"]
    steps = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    assert max(step["lr"] for step in steps) == pytest.approx(LEARNING_RATE)  # the argument arrived
    assert (whole / f"iter_{STEPS:07d}" / "hf" / "model.safetensors").exists()
    assert sorted(path.name for path in (whole / "slurm" / "logs").glob("*/*")) == ["rank0.log", "rank1.log"]


def test_an_uncalled_for_cpu_is_refused_and_not_tried_again(cluster, inputs, tmp_path):
    """SLURM gives the job GPUs, which torch cannot use here."""
    run_dir = tmp_path / "run"
    job = cluster.submit(
        "multi_node.sbatch", "--device", "auto", options=TWO_NODES, **inputs.environment(run_dir, MAX_RESTARTS=3)
    )
    end = cluster.end_of(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert attempts(run_dir) == ["begin", "refused"]
    assert "this job has GPUs" in cluster.output(job)


def test_bad_data_is_not_tried_again(cluster, inputs, tmp_path):
    data, run_dir = tmp_path / "bad.jsonl", tmp_path / "run"
    lines = inputs.data.read_text().splitlines()
    data.write_text("\n".join([*lines[:3], lines[3][:-2], *lines[4:]]) + "\n")
    job = cluster.submit("single_node.sbatch", options=ONE_NODE, **inputs.environment(run_dir, DATA=data))
    end = cluster.end_of(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert attempts(run_dir) == ["begin", "refused"]
    assert f"{data}:4: " in cluster.output(job)


def test_a_stop_during_imports_requeues_the_job(cluster, inputs, troubled, whole, tmp_path):
    run_dir = tmp_path / "run"
    environment = inputs.environment(run_dir, **troubled(IMPORT_SECONDS=4))
    job = cluster.submit("single_node.sbatch", *ARGUMENTS, options=ONE_NODE, **environment)
    (log,) = cluster.wait(lambda: list((run_dir / "slurm" / "logs").glob("*/rank0.log")), "rank 0 has begun")
    assert log.read_text() == ""
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    end = cluster.end_of(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    assert attempts(run_dir) == ["begin", "stopping", "stopped", "begin", "finished"]
    assert results(run_dir) == results(whole)


def test_a_stop_after_the_last_step_changes_nothing(cluster, inputs, troubled, whole, tmp_path):
    run_dir = tmp_path / "run"
    environment = inputs.environment(run_dir, **troubled(EXIT_SECONDS=30))
    job = cluster.submit("single_node.sbatch", *ARGUMENTS, options=ONE_NODE, **environment)
    beat = run_dir / "heartbeat.json"
    cluster.wait(lambda: beat.exists() and json.loads(beat.read_text())["state"] == "done", "the last step is done")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    end = cluster.end_of(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), cluster.output(job)
    assert attempts(run_dir) == ["begin", "stopping", "finished"]
    assert results(run_dir) == results(whole)


def test_a_stop_before_a_finished_run_goes_on_is_no_end(cluster, inputs, troubled, whole, tmp_path):
    """What the folder says of its end is then older than the job."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("slurm"))
    environment = inputs.environment(run_dir, **troubled(IMPORT_SECONDS=4))
    job = cluster.submit("single_node.sbatch", *ARGUMENTS, options=ONE_NODE, **environment)
    cluster.wait(lambda: list((run_dir / "slurm" / "logs").glob("*/rank0.log")), "rank 0 has begun")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    end = cluster.end_of(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    assert attempts(run_dir) == ["begin", "stopping", "stopped", "begin", "finished"]


def test_a_killed_rank_is_tried_again(cluster, inputs, troubled, whole, tmp_path):
    run_dir, at = tmp_path / "run", SAVED_EVERY + 2
    trouble = {"DIE_AT": at, "DIE_TIMES": 1, "DIED": tmp_path / "died"}
    environment = inputs.environment(run_dir, **troubled(**trouble))
    job = cluster.submit("multi_node.sbatch", *ARGUMENTS, options=TWO_NODES, **environment)
    end = cluster.end_of(job)
    assert end["JobState"] == "COMPLETED", cluster.output(job)
    assert attempts(run_dir) == ["begin", "failed", "begin", "finished"]
    assert f"steps {SAVED_EVERY + 1} to {STEPS}" in cluster.output(job)
    assert results(run_dir) == results(whole)


def test_a_rank_that_always_dies_is_tried_a_bounded_number_of_times(cluster, inputs, troubled, tmp_path):
    """Over requeues too: the first attempt is requeued by a stop, which does not count."""
    run_dir = tmp_path / "run"
    trouble = {"DIE_AT": 1, "DIE_TIMES": 9, "DIED": tmp_path / "died", "IMPORT_SECONDS": 1}
    environment = inputs.environment(run_dir, MAX_RESTARTS=1, **troubled(**trouble))
    job = cluster.submit("single_node.sbatch", options=ONE_NODE, **environment)
    cluster.wait(lambda: list((run_dir / "slurm" / "logs").glob("*/rank0.log")), "rank 0 has begun")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    end = cluster.end_of(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "1"), cluster.output(job)
    assert attempts(run_dir) == ["begin", "stopping", "stopped", "begin", "failed", "begin", "failed"]
    assert "MAX_RESTARTS=1 allows no further one" in cluster.output(job)


def test_a_lost_node_is_survived(cluster, inputs, troubled, whole, tmp_path):
    run_dir = tmp_path / "run"
    environment = inputs.environment(run_dir, **troubled(STEP_SECONDS=1))
    job = cluster.submit("multi_node.sbatch", *ARGUMENTS, options=TWO_NODES, **environment)
    cluster.wait_for_file(run_dir / f"iter_{SAVED_EVERY:07d}" / "hf")
    node = cluster.run("scontrol", "show", "hostnames", cluster.fields(job)["NodeList"]).split()[1]
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    end = cluster.end_of(job)  # the node comes back by itself (ReturnToService)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    told = [word for word in attempts(run_dir) if word != "stopping"]  # the ranks of the other node may be told
    assert told == ["begin", "begin", "finished"]  # nobody was left to write how the first one ended
    assert results(run_dir) == results(whole)


def test_a_signal_to_one_task_of_an_array_leaves_the_others_alone(cluster, inputs, troubled, whole, tmp_path):
    environment = inputs.environment(tmp_path / "run", **troubled(STEP_SECONDS=0.5))
    array = cluster.submit(
        "single_node.sbatch", *ARGUMENTS, "--seed", "{task}", options=(*ONE_NODE, "--array=1-2"), **environment
    )
    first, second = (tmp_path / "run" / f"task_{task}" for task in (1, 2))
    for run_dir in (first, second):
        cluster.wait_for_file(run_dir / f"iter_{SAVED_EVERY:07d}" / "hf")
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_2")
    ends = [cluster.end_of(f"{array}_{task}") for task in (1, 2)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    assert attempts(first) == ["begin", "finished"]
    assert attempts(second) == ["begin", "stopping", "stopped", "begin", "finished"]
    assert results(first) == results(whole)  # whose seed is 1 too
    assert results(second) != results(whole)


def test_scancel_saves_and_ends_the_job(cluster, inputs, troubled, tmp_path):
    run_dir = tmp_path / "run"
    environment = inputs.environment(run_dir, **troubled(STEP_SECONDS=1))
    job = cluster.submit("multi_node.sbatch", options=TWO_NODES, **environment)
    metrics = run_dir / "metrics.jsonl"
    cluster.wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) == 2, "two steps are done")
    begin = time.monotonic()
    cluster.run("scancel", job)
    assert cluster.end_of(job)["JobState"] == "CANCELLED"
    cluster.wait(lambda: attempts(run_dir) == ["begin", "stopping", "stopped"], "the batch script has ended")
    assert time.monotonic() - begin < 30, "SLURM kills what takes longer"
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    assert saved == len(metrics.read_text().splitlines()) < SAVED_EVERY


def test_a_time_limit_is_survived(cluster, limited, whole):
    job, run_dir = limited["stopped"]
    end = cluster.end_of(job, 420)
    assert end["JobState"] == "COMPLETED", cluster.output(job)
    assert int(end["Restarts"]) >= 1
    told = attempts(run_dir)
    assert told[:3] == ["begin", "stopping", "stopped"] and told[-1] == "finished" and "failed" not in told
    assert results(run_dir) == results(whole)


def test_a_save_that_takes_longer_than_the_grace_period_is_survived(cluster, limited, whole):
    job, run_dir = limited["too slow"]
    end = cluster.end_of(job, 420)
    assert end["JobState"] == "COMPLETED", cluster.output(job)
    assert (run_dir.parent / "hung").exists()
    told = attempts(run_dir)
    assert told[:3] == ["begin", "stopping", "stopped"] and told[-1] == "finished" and "failed" not in told
    assert "has not ended in time: killing it" in cluster.output(job)
    assert results(run_dir) == results(whole)
