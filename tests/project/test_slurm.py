"""The SLURM examples under stub `srun`, `scontrol`, `scancel`: rendezvous, clean stop, when a job is requeued."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import parse_arguments
from tests.helpers.paths import ROOT

SLURM = ROOT / "examples" / "slurm"
SCRIPTS = ["single_node.sbatch", "multi_node.sbatch"]
JOB_ID = "271828"

# Runs until it is told to stop, as a step of long training does; STUB_EXIT ends it at once.
SRUN = """
printf '%s\\n' "$@" > "$STUB/srun.arguments"
env > "$STUB/srun.environment"
trap 'echo TERM >> "$STUB/tasks"; sleep 0.3; echo saved >> "$STUB/tasks"; exit "${STUB_EXIT_ON_TERM:-0}"' TERM
echo $$ > "$STUB/srun.pid"
[[ -z ${STUB_EXIT:-} ]] || exit "$STUB_EXIT"
while true; do sleep 0.02; done
"""
SCONTROL = """
echo "$*" >> "$STUB/scontrol"
[[ $1 != show ]] || printf 'alpha03\\nalpha04\\n'
"""
# As SLURM does without --batch and --full: the tasks get the signal, the batch shell does not.
SCANCEL = """
echo "$*" >> "$STUB/scancel"
[[ $1 == --signal=TERM ]] && kill -TERM "$(< "$STUB/srun.pid")"
"""


class Job:
    """One batch script under stubs that note what is asked of them in `stub`."""

    def __init__(self, folder: Path, script: str, **environment: str) -> None:
        self.stub = folder / "stub"
        bin_dir = folder / "bin"
        self.run_dir = folder / "run with space"
        for directory in (self.stub, bin_dir):
            directory.mkdir(parents=True, exist_ok=True)
        for name, body in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            file = bin_dir / name
            file.write_text(f"#!/usr/bin/env bash\n{body}")
            file.chmod(0o755)
        (folder / "sets.jsonl").touch()
        (folder / "tokenizer").mkdir(exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "CONTAINER", "MASTER", "OMP"))}
        self.environment = clean | {
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "STUB": str(self.stub),
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "alpha[03-04]",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "DATA": str(folder / "sets.jsonl"),
            "TOKENIZER": str(folder / "tokenizer"),
            "RUN_DIR": str(self.run_dir),
            "PYTHON": "some-python",
            **environment,
        }
        # SLURM runs a copy, from a folder that has nothing else of the project.
        spooled = folder / "slurm_script"
        spooled.write_text((SLURM / script).read_text())
        self.process = subprocess.Popen(
            ["bash", str(spooled)], env=self.environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.stub / name).exists():
            assert self.process.poll() is None, self.process.stdout.read().decode()
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.01)

    def finish(self) -> int:
        self.process.communicate(timeout=20)
        return self.process.returncode

    def lines(self, name: str) -> list[str]:
        file = self.stub / name
        return file.read_text().splitlines() if file.exists() else []

    @property
    def requeued(self) -> bool:
        return f"requeue {JOB_ID}" in self.lines("scontrol")

    def trainer_flags(self) -> list[str]:
        arguments = self.lines("srun.arguments")
        return arguments[arguments.index(str(ROOT / "pretrain_ssft.py")) + 1 :]


@pytest.fixture
def start(tmp_path):
    jobs = []

    def _start(script: str = "multi_node.sbatch", **environment: str) -> Job:
        jobs.append(Job(tmp_path, script, **environment))
        return jobs[-1]

    yield _start
    for job in jobs:
        for pid in job.lines("srun.pid"):
            if job.process.poll() is None:
                os.kill(int(pid), signal.SIGKILL)
        job.process.kill()
        job.process.communicate()


@pytest.mark.parametrize("script", SCRIPTS)
def test_rendezvous_and_flags(start, script):
    job = start(script, STUB_EXIT="0")
    assert job.finish() == 0
    environment = dict(line.split("=", 1) for line in job.lines("srun.environment") if "=" in line)
    assert environment["MASTER_ADDR"] == "alpha03"
    assert 1024 <= int(environment["MASTER_PORT"]) < 32768
    assert environment["OMP_NUM_THREADS"] == "8"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()  # the tasks derive them
    arguments = job.lines("srun.arguments")
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(arguments)
    assert not any(a.startswith("--container") for a in arguments)
    assert arguments[arguments.index("some-python") + 1] == str(ROOT / "pretrain_ssft.py")

    # Every flag exists, and the whole is consistent.
    config, dry_run = parse_arguments("", SSFTConfig, job.trainer_flags())
    assert not dry_run
    assert config.run.checkpoint.save == str(job.run_dir) and config.run.checkpoint.load is None
    assert config.run.checkpoint.save_interval is not None
    assert (
        config.run.parallel.bf16
        and config.run.parallel.use_distributed_optimizer
        and config.run.parallel.sequence_parallel
    )
    assert config.run.parallel.recompute_granularity == "full"
    gpus = _directive(script, "nodes") * _directive(script, "ntasks-per-node")
    assert gpus % config.run.parallel.model_parallel_size == 0
    assert config.run.parallel.tensor_model_parallel_size <= _directive(script, "gpus-per-node")


def _directive(script: str, name: str) -> int:
    (line,) = [x for x in (SLURM / script).read_text().splitlines() if x.startswith(f"#SBATCH --{name}=")]
    return int(line.split("=")[1])


def test_ports_of_neighbouring_jobs_differ(tmp_path):
    ports = set()
    for job_id in ("4000000001", "4000000002", "19999", "20000"):
        job = Job(tmp_path / job_id, "multi_node.sbatch", SLURM_JOB_ID=job_id, STUB_EXIT="0")
        assert job.finish() == 0
        (port,) = [int(x.split("=")[1]) for x in job.lines("srun.environment") if x.startswith("MASTER_PORT=")]
        assert 1024 <= port < 32768
        ports.add(port)
    assert len(ports) == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_headers_ask_for_requeue(script):
    text = (SLURM / script).read_text()
    for line in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text


def test_usr1_stops_the_tasks_cleanly_and_requeues(start):
    job = start()
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0
    assert job.lines("scancel") == [f"--signal=TERM {JOB_ID}"]
    assert job.lines("tasks") == ["TERM", "saved"]  # the shell waited for the trainer to finish saving
    assert job.requeued


def test_no_requeue_when_the_stop_fails(start):
    job = start(STUB_EXIT_ON_TERM="3")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 3
    assert job.lines("tasks") == ["TERM", "saved"]
    assert not job.requeued


@pytest.mark.parametrize("status", [0, 1, 137])
def test_no_requeue_when_the_trainer_ends_by_itself(start, status):
    job = start(STUB_EXIT=str(status))
    assert job.finish() == status
    assert not job.requeued and not job.lines("scancel")


def test_term_stops_cleanly_without_requeue(start):
    """scancel and preemption: requeueing here would bring a cancelled job back."""
    job = start()
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 0
    assert job.lines("tasks") == ["TERM", "saved"]
    assert not job.requeued


def test_second_usr1_while_saving_changes_nothing(start):
    job = start()
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    job.wait_for("tasks")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0
    assert job.lines("tasks")[-1] == "saved" and job.lines("scontrol").count(f"requeue {JOB_ID}") == 1


def test_restart_loads_the_same_folder_once_it_holds_a_checkpoint(start):
    job = start(STUB_EXIT="0")
    assert job.finish() == 0
    first = job.trainer_flags()
    assert "--load" not in first
    (job.run_dir / "latest_checkpointed_iteration.txt").write_text("20")
    again = start(STUB_EXIT="0")
    assert again.finish() == 0
    # what a job was fine-tuned from is not what it goes on from
    assert again.trainer_flags() == [*first, "--load", str(job.run_dir), "--no-finetune"]


def test_container_mounts_what_the_trainer_needs(start, tmp_path):
    job = start(STUB_EXIT="0", CONTAINER_IMAGE="images/ssft.sqsh", CONTAINER_MOUNTS="/scratch:/scratch")
    assert job.finish() == 0
    options = dict(x.split("=", 1) for x in job.lines("srun.arguments") if x.startswith("--container"))
    assert options["--container-image"] == "images/ssft.sqsh"
    mounts = options["--container-mounts"].split(",")
    for folder in (ROOT, job.run_dir, tmp_path, tmp_path / "tokenizer", "/scratch"):
        assert f"{folder}:{folder}" in mounts


@pytest.mark.parametrize("missing", ["DATA", "TOKENIZER", "RUN_DIR"])
def test_a_missing_variable_is_named(start, missing):
    job = start(**{missing: ""})
    output, _ = job.process.communicate(timeout=20)
    assert job.process.returncode != 0
    assert missing in output.decode()
    assert not job.lines("srun.pid")


def test_sentencepiece_example_flags(tmp_path):
    """The script under a stub torchrun hands the trainer flags that exist, with the caller's own ones last."""
    stub = tmp_path / "torchrun"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    script = (
        tmp_path / "examples" / "gsm8k_sentencepiece.sh"
    )  # away from the repository, whose .venv would be preferred
    script.parent.mkdir()
    script.write_text((ROOT / "examples" / "gsm8k_sentencepiece.sh").read_text())
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(script), "data.jsonl", "tok.model", "run", "--train-iters", "3"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:2] == ["--nproc-per-node", "4"]
    config, _ = parse_arguments("", SSFTConfig, out[3:])
    assert config.run.parallel.model_parallel_size == 4
    assert config.run.training.train_iters == 3
    assert config.data.data_path == ["data.jsonl"] and config.run.checkpoint.save == "run"
