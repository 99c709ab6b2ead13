"""The batch script of the online loop, over stand-ins for the interpreter and SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from megatron_ssft.rounds.server import server_command
from tests.helpers.online_loop import checked
from tests.helpers.paths import ROOT

JOB_ID = "314159"
# In place of the loop: tells what it was given, and works until it is told to stop.
LOOP = """
printf '%s\\0' "$@" > "$STUB/arguments"
env > "$STUB/environment"
trap 'echo TERM >> "$STUB/told"; sleep 0.2; exit "${STUB_EXIT_ON_TERM:-143}"' TERM
touch "$STUB/ready"
[[ -z ${STUB_EXIT:-} ]] || exit "$STUB_EXIT"
while true; do sleep 0.02; done
"""
SCONTROL = """
echo "$*" >> "$STUB/scontrol"
[[ $1 != show ]] || printf 'alpha03\\nalpha04\\n'
"""


def submit(place, **environment):
    """gfpo_loop.sbatch with stand-ins for the interpreter and SLURM."""
    folder = place.folder / "bin with space"
    folder.mkdir()
    for name, body in {"python": LOOP, "scontrol": SCONTROL}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    script = place.folder / "slurm_script"  # SLURM runs a copy
    script.write_text((ROOT / "examples" / "slurm" / "gfpo_loop.sbatch").read_text())
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "OMP", "STUB"))}
    environment = clean | {
        "PATH": f"{folder}:{os.environ['PATH']}", "STUB": str(place.folder), "PYTHON": str(folder / "python"),
        "SLURM_JOB_ID": JOB_ID, "SLURM_JOB_NODELIST": "alpha[03-04]", "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": str(ROOT), "LOAD": str(place.folder / "start"), "QUESTIONS": str(place.data),
        "WORK": str(place.work), **environment,
    }  # fmt: skip
    with open(place.folder / "out", "w") as out:
        process = subprocess.Popen(["bash", str(script)], env=environment, cwd=place.folder, stdout=out, stderr=out)
    place.started.append(process)
    deadline = time.monotonic() + 20
    while not (place.folder / "ready").exists():
        assert time.monotonic() < deadline and process.poll() in (None, 0, 7, 143), (place.folder / "out").read_text()
        time.sleep(0.01)
    return process


def test_the_batch_script_gives_flags_that_exist(program, place):
    assert submit(place, STUB_EXIT="0", VLLM="/opt/my vllm/bin/vllm").wait(20) == 0
    script, *given = (place.folder / "arguments").read_text().split("\0")[:-1]
    assert script == str(ROOT / "tools" / "run_gfpo.py")
    commands = checked(program, place, *given)
    options = commands.options
    assert (options.load, options.data, options.save) == (place.folder / "start", place.data, place.work)
    assert commands.launcher()[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert commands.launcher()[3:] == [str(place.folder / "bin with space" / "python")]
    assert options.stop_launched == f"scancel --signal=TERM {JOB_ID}"
    environment = dict(line.split("=", 1) for line in place.lines("environment") if "=" in line)
    assert environment["MASTER_ADDR"] == "alpha03"
    port = int(options.base_url.rpartition(":")[2].removesuffix("/v1"))
    assert int(environment["MASTER_PORT"]) < 30000 <= port < 32768
    server = server_command(options.serve, place.folder)
    assert server[:3] == ["/opt/my vllm/bin/vllm", "serve", str(place.folder)]
    assert server[server.index("--port") + 1] == str(port)


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_batch_script_stops_the_loop_and_is_requeued_before_the_time_limit(place, number, requeued):
    process = submit(place)
    process.send_signal(number)
    assert process.wait(20) == (0 if requeued else 143)
    assert place.lines("told") == ["TERM"]
    assert (f"requeue {JOB_ID}" in place.lines("scontrol")) == requeued


@pytest.mark.parametrize("status", [0, 7])
def test_the_batch_script_is_not_requeued_when_the_loop_ends_by_itself(place, status):
    assert submit(place, STUB_EXIT=str(status)).wait(20) == status
    assert f"requeue {JOB_ID}" not in place.lines("scontrol")


def test_the_batch_script_is_not_requeued_when_the_stop_fails(place):
    process = submit(place, STUB_EXIT_ON_TERM="7")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 7
    assert f"requeue {JOB_ID}" not in place.lines("scontrol")
