"""The SLURM examples under stub `srun`, `scontrol`, `scancel`: rendezvous, clean stop, when a job is requeued."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.training.startup import complete_values
from tests.helpers.paths import ROOT
from tests.helpers.shape_folders import shape_folder

SLURM = ROOT / "examples" / "slurm"
SCRIPTS = ["single_node.sbatch", "multi_node.sbatch"]
JOB_ID = "271828"

# Runs until it is told to stop, as a step of long training does; STUB_EXIT ends it at once, one word for each start.
SRUN = """
printf '%s\\0' "$@" > "$STUB/srun.arguments"
env > "$STUB/srun.environment"
trap 'echo TERM >> "$STUB/tasks"; [[ -z ${STUB_DEAF:-} ]] || { sleep 60 > /dev/null 2>&1 & wait; }
    [[ -z ${STUB_STATE:-} ]] || echo "{\\"state\\": \\"$STUB_STATE\\"}" > "$RUN_DIR/heartbeat.json"
    sleep 0.3; echo saved >> "$STUB/tasks"; exit "${STUB_EXIT_ON_TERM:-0}"' TERM
echo $$ >> "$STUB/srun.starts"
echo $$ > "$STUB/srun.pid"
read -ra ends <<< "${STUB_EXIT:-}"
number=$(wc -l < "$STUB/srun.starts")
if [[ -n ${ends[number - 1]:-} ]]; then
    [[ -z ${STUB_BAD_INPUT:-} ]] || : > "$SSFT_BAD_INPUT"
    exit "${ends[number - 1]}"
fi
while true; do sleep 0.02; done
"""
SCONTROL = """
echo "$*" >> "$STUB/scontrol"
if [[ -n ${STUB_BUSY:-} && "$*" == "$STUB_BUSY"* && ! -e "$STUB/was-busy" ]]; then
    : > "$STUB/was-busy"
    echo "slurm_load: Unable to contact slurm controller" >&2
    exit 1
fi
case "$1 $2" in
    "show hostnames") printf 'alpha03\\nalpha04\\n' ;;
    "show node") [[ -n ${STUB_NO_ADDRESS:-} ]] || echo "NodeName=$3 NodeAddr=10.0.0.3 NodeHostName=$3" ;;
    "show job") echo "JobId=1 EndTime=$(date -d "${STUB_SECONDS_LEFT:-300} seconds" +%Y-%m-%dT%H:%M:%S) Deadline=N/A" ;;
esac
"""
# As SLURM does without --batch and --full: the tasks get the signal, the batch shell does not.
SCANCEL = """
echo "$*" >> "$STUB/scancel"
[[ -z ${STUB_LATE:-} || $(wc -l < "$STUB/scancel") -gt 1 ]] || exit 0  # the step has not begun
[[ $1 == --signal=TERM ]] && kill -TERM "$(< "$STUB/srun.pid")"
"""


class Job:
    """One batch script under stubs that note what is asked of them in `stub`."""

    def __init__(self, folder: Path, script: str, *arguments: str, **environment: str) -> None:
        self.stub = folder / "stub"
        bin_dir = folder / "bin"
        self.run_dir = folder / "run with space"
        self.model = folder / "model"
        for directory in (self.stub, bin_dir):
            directory.mkdir(parents=True, exist_ok=True)
        shape_folder(self.model, "7b" if "single" in script else "32b")
        for name, body in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            file = bin_dir / name
            file.write_text(f"#!/usr/bin/env bash\n{body}")
            file.chmod(0o755)
        for name in ("sets.jsonl", "held out.jsonl"):
            (folder / name).touch()
        prefixes = ("SLURM", "CONTAINER", "MASTER", "OMP", "RECIPE", "STUB")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
        self.environment = clean | {
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "STUB": str(self.stub),
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "alpha[03-04]",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "MODEL": str(self.model),
            "DATA": str(folder / "sets.jsonl"),
            "RUN_DIR": str(self.run_dir),
            "PYTHON": "some-python",
            **environment,
        }
        # SLURM runs a copy, from a folder that has nothing else of the project.
        spooled = folder / "slurm_script"
        spooled.write_text((SLURM / script).read_text())
        self.process = subprocess.Popen(
            ["bash", str(spooled), *arguments],
            env=self.environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.stub / name).exists():
            assert self.process.poll() is None, self.process.stdout.read().decode()
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.01)

    def finish(self) -> int:
        self.output = self.process.communicate(timeout=60)[0].decode()
        return self.process.returncode

    def lines(self, name: str) -> list[str]:
        file = self.stub / name
        return file.read_text().splitlines() if file.exists() else []

    @property
    def srun_arguments(self) -> list[str]:
        return (self.stub / "srun.arguments").read_text().split("\0")[:-1]

    @property
    def attempts(self) -> list[str]:
        """The first word of each line of the job's record."""
        return [line.split()[0] for line in (self.run_dir / "slurm" / f"attempts-{JOB_ID}").read_text().splitlines()]

    @property
    def starts(self) -> int:
        return len(self.lines("srun.starts"))

    @property
    def requeued(self) -> bool:
        return f"requeue {JOB_ID}" in self.lines("scontrol")

    def trainer_flags(self) -> list[str]:
        arguments = self.srun_arguments
        return arguments[arguments.index(str(ROOT / "pretrain_ssft.py")) + 1 :]


@pytest.fixture
def start(tmp_path):
    jobs = []

    def _start(script: str = "multi_node.sbatch", *arguments: str, **environment: str) -> Job:
        jobs.append(Job(tmp_path, script, *arguments, **environment))
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
    job = start(script, "--lr", "3e-5", "--seed=7", STUB_EXIT="0")
    assert job.finish() == 0, job.output
    environment = dict(line.split("=", 1) for line in job.lines("srun.environment") if "=" in line)
    assert environment["MASTER_ADDR"] == "10.0.0.3"
    assert 1024 <= int(environment["MASTER_PORT"]) < 32768
    assert environment["OMP_NUM_THREADS"] == "8"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and int(environment["TORCH_FR_BUFFER_SIZE"]) > 0
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()  # the tasks derive them
    arguments = job.srun_arguments
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(arguments)
    assert not any(a.startswith("--container") for a in arguments)
    place = arguments.index("some-python")
    assert arguments[place - 2 : place] == ["bash", str(SLURM / "rank.sh")]
    assert arguments[place + 1] == str(ROOT / "pretrain_ssft.py")

    # Every flag exists, and the whole is consistent.
    config, dry_run = parse_arguments("", SSFTConfig, job.trainer_flags(), complete_values)
    assert not dry_run
    assert config.run.checkpoint.save == str(job.run_dir) and config.run.checkpoint.load == str(job.model)
    assert config.run.checkpoint.save_interval is not None and config.run.checkpoint.export_hf_at_save
    assert (config.run.training.lr, config.run.training.seed) == (3e-5, 7)  # the caller's, not the recipe's
    parallel = config.run.parallel
    assert parallel.bf16 and parallel.use_distributed_optimizer and parallel.sequence_parallel
    assert parallel.recompute_granularity == "full"
    gpus = _directive(script, "nodes") * _directive(script, "ntasks-per-node")
    assert gpus % parallel.model_parallel_size == 0
    assert parallel.tensor_model_parallel_size <= _directive(script, "gpus-per-node")


def _directive(script: str, name: str) -> int:
    (line,) = [x for x in (SLURM / script).read_text().splitlines() if x.startswith(f"#SBATCH --{name}=")]
    return int(line.split("=")[1])


@pytest.mark.parametrize("flag", ["--save", "--load", "--config"])
@pytest.mark.parametrize("joined", [True, False])
def test_what_the_environment_decides_is_no_argument(start, flag, joined):
    job = start("multi_node.sbatch", *([f"{flag}=x"] if joined else [flag, "x"]), STUB_EXIT="0")
    assert job.finish() == 2
    assert flag in job.output and not job.starts


def test_held_out_data_and_a_recipe_of_ones_own(start, tmp_path):
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("train_iters: 3\ntensor_model_parallel_size: 2\n")
    job = start(STUB_EXIT="0", RECIPE=str(recipe), EVAL_DATA=str(tmp_path / "held out.jsonl"))
    assert job.finish() == 0, job.output
    config, _ = parse_arguments("", SSFTConfig, job.trainer_flags(), complete_values)
    assert config.data.eval_data_path == [str(tmp_path / "held out.jsonl")]
    assert config.run.training.train_iters == 3


def test_ports_of_neighbouring_jobs_differ(tmp_path):
    ports = set()
    for job_id in ("4000000001", "4000000002", "19999", "20000"):
        job = Job(tmp_path / job_id, "multi_node.sbatch", SLURM_JOB_ID=job_id, STUB_EXIT="0")
        assert job.finish() == 0, job.output
        ports.add(_port(job))
    assert len(ports) == 4


def _port(job: Job) -> int:
    (port,) = [int(x.split("=")[1]) for x in job.lines("srun.environment") if x.startswith("MASTER_PORT=")]
    assert 1024 <= port < 32768
    return port


def test_a_port_in_use_is_passed_over(tmp_path):
    job = Job(tmp_path / "first", "multi_node.sbatch", SLURM_JOB_ID=JOB_ID, STUB_EXIT="0")
    assert job.finish() == 0, job.output
    with socket.create_server(("127.0.0.1", _port(job))):
        second = Job(tmp_path / "second", "multi_node.sbatch", SLURM_JOB_ID=JOB_ID, STUB_EXIT="0")
        assert second.finish() == 0, second.output
    assert _port(second) == _port(job) + 1
    assert f"port {_port(job)} is in use" in second.output


@pytest.mark.parametrize("script", [*SCRIPTS, "gfpo_loop.sbatch"])
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
    assert job.attempts == ["begin", "stopping", "stopped"]


def test_usr1_before_the_trainer_listens_requeues(start):
    """As during imports: ended by the signal itself, with nothing begun."""
    job = start(STUB_EXIT_ON_TERM="143")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0
    assert job.requeued and job.attempts == ["begin", "stopping", "stopped"]


def test_what_does_not_end_before_the_time_limit_is_killed_and_requeued(start):
    job = start(STUB_DEAF="1", STUB_SECONDS_LEFT="4", STOP_MARGIN="2")
    job.wait_for("srun.pid")
    begin = time.monotonic()
    job.process.send_signal(signal.SIGUSR1)
    job.wait_for("tasks")
    time.sleep(3)
    os.kill(int(job.lines("srun.pid")[0]), signal.SIGKILL)  # what a TERM to the real srun amounts to
    assert job.finish() == 0
    assert time.monotonic() - begin < 30
    assert "has not ended in time" in job.output
    assert job.requeued and job.attempts == ["begin", "stopping", "stopped"]


def test_a_stop_that_fails_is_a_failure_and_goes_on_elsewhere(start):
    job = start(STUB_EXIT_ON_TERM="3")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0
    assert job.lines("tasks") == ["TERM", "saved"]
    assert job.requeued and job.attempts == ["begin", "stopping", "failed"]


@pytest.mark.parametrize("question", ["requeue", "show job", "show node"])
def test_a_controller_that_is_busy_for_a_moment_ends_no_job(start, question):
    job = start(STUB_BUSY=question)
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0, job.output
    assert (job.stub / "was-busy").exists()
    assert job.requeued and job.attempts == ["begin", "stopping", "stopped"]


def test_where_the_controller_does_not_know_the_address_the_name_is_taken(tmp_path):
    job = Job(tmp_path, "multi_node.sbatch", STUB_EXIT="0", STUB_NO_ADDRESS="yes")
    assert job.finish() == 0, job.output
    assert "MASTER_ADDR=alpha03" in job.lines("srun.environment")


@pytest.mark.slow
def test_a_step_that_had_not_begun_is_asked_again(start):
    job = start(STUB_LATE="yes")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0, job.output
    assert job.lines("tasks") == ["TERM", "saved"] and len(job.lines("scancel")) == 2
    assert job.requeued and job.attempts == ["begin", "stopping", "stopped"]


def test_a_trainer_that_somebody_else_stops_is_not_finished(start):
    job = start(STUB_STATE="stopped")
    job.wait_for("srun.pid")
    os.kill(int((job.stub / "srun.pid").read_text()), signal.SIGTERM)
    assert job.finish() == 143
    assert not job.requeued and job.attempts == ["begin", "stopped"]
    assert "is not finished" in job.output


def test_a_trainer_that_finishes_as_it_is_stopped_is_not_requeued(start):
    job = start(STUB_STATE="done")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0
    assert not job.requeued


@pytest.mark.parametrize(("steps", "now", "status"), [((0, 10, 20), 30, 0), ((0, 10, 10), 30, 1), ((0, 10, 20), 20, 1)])
def test_a_preempted_job_that_is_killed_in_its_save_has_failed_if_it_got_nowhere(start, tmp_path, steps, now, status):
    """SLURM kills the batch shell as well, so nobody writes how it ended."""
    run = tmp_path / "run with space"
    (run / "slurm").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text(f"{now}")
    lines = "".join(f"begin then on n1 at {step}\nstopping then by TERM\n" for step in steps)
    (run / "slurm" / f"attempts-{JOB_ID}").write_text(lines)
    job = start(STUB_EXIT="0", MAX_RESTARTS="0")
    assert job.finish() == status, job.output


@pytest.mark.parametrize("name", ["MODEL", "DATA", "RECIPE", "EVAL_DATA"])
def test_what_is_not_there_is_named(tmp_path, name):
    job = Job(tmp_path, "multi_node.sbatch", **{name: "not there"})
    assert job.finish() == 2
    assert job.output.splitlines()[-1] == f"launch.sh: {name}=not there: there is no such file or folder"


def test_a_model_of_a_download_cache_is_mounted_with_the_files_it_links_to(tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    job = Job(tmp_path, "multi_node.sbatch", MODEL=str(snapshot), STUB_EXIT="0", CONTAINER_IMAGE="image.sqsh",
              CONTAINER_ENV="FIRST,SECOND", FI_PROVIDER="efa", FIRST="1", SECOND="2")  # fmt: skip
    assert job.finish() == 0, job.output
    (mounts,) = [word for word in job.srun_arguments if word.startswith("--container-mounts=")]
    assert f"{blobs}:{blobs}" in mounts and f"{snapshot}:{snapshot}" in mounts
    (names,) = [word for word in job.srun_arguments if word.startswith("--container-env=")]
    assert {"FI_PROVIDER", "FIRST", "SECOND"} <= set(names.removeprefix("--container-env=").split(","))


def test_bad_input_found_while_stopping_is_not_requeued(start):
    job = start(STUB_EXIT_ON_TERM="2")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 2
    assert not job.requeued


def test_a_finished_job_is_not_requeued(start):
    job = start(STUB_EXIT="0")
    assert job.finish() == 0
    assert not job.requeued and not job.lines("scancel") and job.attempts == ["begin", "finished"]


def test_bad_input_is_not_tried_again(start):
    job = start(STUB_EXIT="2")
    assert job.finish() == 2
    assert job.starts == 1 and not job.requeued


def test_bad_input_that_slurm_reports_as_a_killed_task_is_not_tried_again(start):
    job = start(STUB_EXIT="137", STUB_BAD_INPUT="1")
    assert job.finish() == 2
    assert job.starts == 1 and not job.requeued


@pytest.mark.parametrize("status", ["1", "75", "137"])
def test_a_failure_is_tried_again_at_another_port(start, status):
    job = start(STUB_EXIT=f"{status} 0")
    assert job.finish() == 0
    assert job.starts == 2 and job.attempts == ["begin", "failed", "begin", "finished"]
    first, second = job.lines("scontrol").count("show node alpha03 --oneliner"), _port(job)
    assert first == 2 and second != 10000 + (int(JOB_ID) + 1009) % 20000


def test_restarts_are_bounded_over_requeues(start):
    job = start(STUB_EXIT="137 137 137 137 137 137 0", MAX_RESTARTS="2")
    assert job.finish() == 137
    assert job.starts == 3 and "MAX_RESTARTS" in job.output
    again = start(STUB_EXIT="0 0 0 0", MAX_RESTARTS="2")  # as after a requeue by hand
    assert again.finish() == 1
    assert again.starts == 3


def test_a_batch_shell_that_went_with_its_node_counts(start):
    job = start(MAX_RESTARTS="0")
    job.wait_for("srun.pid")
    job.process.kill()
    job.process.wait()
    os.kill(int(job.lines("srun.pid")[0]), signal.SIGKILL)
    again = start(MAX_RESTARTS="0", STUB_EXIT="0 0")
    assert again.finish() == 1
    assert again.starts == 1


def test_stops_do_not_count_as_failures(start):
    for _ in range(3):
        job = start(MAX_RESTARTS="0")
        job.wait_for("srun.pid")
        job.process.send_signal(signal.SIGUSR1)
        assert job.finish() == 0, job.output
        (job.stub / "srun.pid").unlink()
    assert job.attempts == ["begin", "stopping", "stopped"] * 3


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


def test_a_task_of_an_array_is_addressed_and_trains_in_a_folder_of_its_own(start):
    job = start("multi_node.sbatch", "--seed", "10{task}", SLURM_ARRAY_JOB_ID="99", SLURM_ARRAY_TASK_ID="4")
    job.wait_for("srun.pid")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 0, job.output
    assert job.lines("scancel") == ["--signal=TERM 99_4"]
    assert "requeue 99_4" in job.lines("scontrol") and not job.requeued
    flags = job.trainer_flags()
    assert flags[flags.index("--save") + 1] == str(job.run_dir / "task_4")
    assert flags[flags.index("--seed") + 1] == "104"


def test_a_task_in_an_argument_needs_an_array(start):
    job = start("multi_node.sbatch", "--seed", "{task}", STUB_EXIT="0")
    assert job.finish() == 2
    assert "{task}" in job.output and not job.starts


def test_restart_loads_the_same_folder_once_it_holds_a_checkpoint(start):
    job = start(STUB_EXIT="0")
    assert job.finish() == 0
    first = job.trainer_flags()
    assert first[-2:] == ["--load", str(job.model)]
    (job.run_dir / "latest_checkpointed_iteration.txt").write_text("20")
    again = start(STUB_EXIT="0 0")
    assert again.finish() == 0
    # what a job was fine-tuned from is not what it goes on from
    assert again.trainer_flags() == [*first[:-2], "--load", str(job.run_dir), "--no-finetune"]


@pytest.mark.parametrize("runtime", ["pyxis", "enroot", "apptainer"])
def test_a_container_has_what_the_trainer_needs(start, tmp_path, runtime):
    job = start(
        STUB_EXIT="0",
        CONTAINER_IMAGE="images/ssft.sqsh",
        CONTAINER_MOUNTS="/scratch:/data,/opt:/opt",
        CONTAINER_RUNTIME=runtime,
        NCCL_SOCKET_IFNAME="ib0",
        EVAL_DATA=str(tmp_path / "held out.jsonl"),
    )
    assert job.finish() == 0, job.output
    arguments = job.srun_arguments
    environment = dict(line.split("=", 1) for line in job.lines("srun.environment") if "=" in line)
    rank, program = arguments.index(str(SLURM / "rank.sh")), arguments.index("some-python")
    if runtime == "pyxis":
        options = dict(x.split("=", 1) for x in arguments if x.startswith("--container"))
        assert options["--container-image"] == "images/ssft.sqsh"
        mounts = options["--container-mounts"].split(",")
        names = options["--container-env"].split(",")
        assert program == rank + 1
    elif runtime == "enroot":
        words = arguments[rank + 1 : program]
        assert words[:2] == ["enroot", "start"] and words[-1] == "images/ssft.sqsh"
        mounts = [b for a, b in zip(words, words[1:]) if a == "--mount"]
        names = [b for a, b in zip(words, words[1:]) if a == "--env"]
        assert {"SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_NTASKS"} <= set(names)
    else:
        words = arguments[rank + 1 : program]
        assert words[:2] == ["apptainer", "exec"] and words[-1] == "images/ssft.sqsh"
        mounts = [b for a, b in zip(words, words[1:]) if a == "--bind"]
        names = [name.removeprefix("APPTAINERENV_") for name in environment if name.startswith("APPTAINERENV_")]
        assert environment["APPTAINERENV_MASTER_ADDR"] == "10.0.0.3"
    folders = (ROOT, job.run_dir, tmp_path, job.model, ROOT / "examples" / "recipes")
    assert {f"{folder}:{folder}" for folder in folders} | {"/scratch:/data", "/opt:/opt"} <= set(mounts)
    assert {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "TORCH_FR_BUFFER_SIZE"} <= set(names)


def test_an_unknown_container_runtime_is_refused(start):
    job = start(STUB_EXIT="0", CONTAINER_IMAGE="x", CONTAINER_RUNTIME="docker")
    assert job.finish() == 2
    assert "CONTAINER_RUNTIME=docker" in job.output and not job.starts


@pytest.mark.parametrize("missing", ["DATA", "MODEL", "RUN_DIR"])
def test_a_missing_variable_is_named(start, missing):
    job = start(**{missing: ""})
    assert job.finish() != 0
    assert missing in job.output
    assert not job.starts


@pytest.mark.parametrize(("name", "value"), [("MAX_RESTARTS", "many"), ("STOP_MARGIN", "-3")])
def test_a_number_that_is_none_is_refused(start, name, value):
    job = start(**{name: value})
    assert job.finish() == 2
    assert f"{name}={value}" in job.output and not job.starts


def test_the_dumps_of_a_collective_that_timed_out_are_named(start):
    job = start(STUB_EXIT="75 0")
    flight = job.run_dir / "slurm" / "flight"
    flight.mkdir(parents=True, exist_ok=True)
    (flight / f"{JOB_ID}.1-rank0").touch()
    assert job.finish() == 0, job.output
    assert f"flight recorder wrote 1 files: {flight}/{JOB_ID}.1-rank*" in job.output


# -- what each task runs ---------------------------------------------------------------------------------------------


def run_rank(tmp_path, program, rank=3):
    """(status, what the job shows, the rank's log, whether the input is marked as bad) of rank.sh."""
    environment = os.environ | {
        "SLURM_PROCID": str(rank), "SSFT_LOGS": str(tmp_path / "logs"), "SSFT_BAD_INPUT": str(tmp_path / "bad"),
        "SSFT_STOPPED_EARLY": str(tmp_path / "early"),
    }  # fmt: skip
    result = subprocess.run(
        ["bash", str(SLURM / "rank.sh"), "bash", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    log = (tmp_path / "logs" / f"rank{rank}.log").read_text()
    return result.returncode, result.stdout + result.stderr, log, (tmp_path / "bad").exists()


CHATTER = "echo out; echo err >&2; echo '[rank 3] is lost' >&2; "


def test_the_first_task_is_shown_whole(tmp_path):
    status, shown, log, _ = run_rank(tmp_path, CHATTER, rank=0)
    assert status == 0
    assert sorted(shown.split("\n")) == sorted(log.split("\n")) == sorted(["out", "err", "[rank 3] is lost", ""])


def test_of_other_tasks_what_they_say_of_themselves_is_shown(tmp_path):
    status, shown, log, bad = run_rank(tmp_path, CHATTER)
    assert (status, shown, bad) == (0, "[rank 3] is lost\n", False)
    assert sorted(log.splitlines()) == ["[rank 3] is lost", "err", "out"]


def test_the_end_of_a_task_that_crashes_is_shown(tmp_path):
    status, shown, _, bad = run_rank(tmp_path, "for i in $(seq 50); do echo line $i; done; kill -9 $$")
    assert (status, bad) == (137, False)
    assert "[rank 3] line 50" in shown and "line 20\n" not in shown and "status 137" in shown


def test_status_2_marks_the_input_as_bad(tmp_path):
    assert run_rank(tmp_path, "exit 2")[::3] == (2, True)


def test_a_term_to_all_of_a_task_reaches_the_program_alone(tmp_path):
    """As `scancel --signal=TERM` sends it: the program saves, its last lines arrive."""
    environment = os.environ | {
        "SLURM_PROCID": "0", "SSFT_LOGS": str(tmp_path / "logs"), "SSFT_BAD_INPUT": str(tmp_path / "bad"),
        "SSFT_STOPPED_EARLY": str(tmp_path / "early"),
    }  # fmt: skip
    program = "trap 'sleep 0.5; echo saved; exit 0' TERM; echo ready; while true; do sleep 0.05; done"
    with subprocess.Popen(
        ["bash", str(SLURM / "rank.sh"), "bash", "-c", program],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
        assert process.wait(20) == 0


def test_a_program_that_does_not_listen_ends_by_the_signal(tmp_path):
    environment = os.environ | {
        "SLURM_PROCID": "0", "SSFT_LOGS": str(tmp_path / "logs"), "SSFT_BAD_INPUT": str(tmp_path / "bad"),
        "SSFT_STOPPED_EARLY": str(tmp_path / "early"),
    }  # fmt: skip
    with subprocess.Popen(
        ["bash", str(SLURM / "rank.sh"), sys.executable, "-c",
         "import time; print('ready', flush=True); time.sleep(60)"],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(20) == 143


@pytest.mark.slow
def test_a_signal_at_the_moment_the_program_ends_is_no_hang(tmp_path):
    """Both get the TERM together, and which of the two ends first is a matter of chance."""
    environment = os.environ | {
        "SLURM_PROCID": "0", "SSFT_LOGS": str(tmp_path), "SSFT_STOPPED_EARLY": str(tmp_path / "early")
    }  # fmt: skip
    command = ["bash", str(SLURM / "rank.sh"), "bash", "-c", "trap 'exit 143' TERM; sleep 0.02"]
    for repetition in range(80):
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:
            time.sleep(0.02 + 0.0005 * (repetition % 40))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                # The last two: before rank.sh or what writes its log has got to its trap.
                assert process.wait(10) in (0, 143, -signal.SIGTERM, 128 + signal.SIGPIPE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


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
