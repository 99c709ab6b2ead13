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
SLURM = ROOT / "examples" / "slurm"
# In place of the loop: tells what it was given, and works until it is told to stop.
LOOP = """
printf '%s\\0' "$@" > "$STUB/arguments"
env > "$STUB/environment"
echo begin >> "$STUB/starts"
trap 'echo TERM >> "$STUB/told"; sleep 0.2; exit "${STUB_EXIT_ON_TERM:-143}"' TERM
touch "$STUB/ready"
if [[ -n ${STUB_ASK:-} ]]; then
    bash "$STUB_HOME/examples/slurm/on_host.sh" $STUB_ASK > "$STUB/answer" &
    asked=$!
    trap 'kill -TERM $asked' TERM
    while true; do wait $asked; status=$?; kill -0 $asked 2> /dev/null || break; done
    echo $status > "$STUB/answered"
    exit 0
fi
[[ -z ${STUB_EXIT:-} ]] || exit "$STUB_EXIT"
while true; do sleep 0.02; done
"""
SCONTROL = """
echo "$*" >> "$STUB/scontrol"
case "$1 $2" in
    "show hostnames") printf 'alpha03\\nalpha04\\n' ;;
    "show node") echo "NodeName=$3 NodeAddr=10.0.0.${3#alpha0} NodeHostName=$3" ;;
    "show job") echo "JobId=1 EndTime=Unknown Deadline=N/A" ;;
esac
"""
# A step runs one task here, and is known to squeue by its name as long as it runs.
SRUN = """
printf '%s\\0' "$@" > "$STUB/srun.arguments"
while [[ $1 == --* ]]; do
    [[ $1 != --job-name=* ]] || echo "314159.7 ${1#*=}" > "$STUB/steps"
    shift
done
echo $$ > "$STUB/srun.pid"
export SLURM_PROCID=0
"$@" &
task=$!
echo $task > "$STUB/task.pid"
trap 'kill -KILL $task; exit 143' TERM
wait $task
status=$?
rm -f "$STUB/steps"
exit $status
"""
SQUEUE = 'cat "$STUB/steps" 2> /dev/null'
SCANCEL = """
echo "$*" >> "$STUB/scancel"
[[ $1 == --signal=TERM ]] && pkill -TERM -P "$(< "$STUB/task.pid")"
"""


def submit(place, *arguments, **environment):
    """gfpo_loop.sbatch with stand-ins for the interpreter and SLURM."""
    folder = place.folder / "bin with space"
    folder.mkdir(exist_ok=True)
    stubs = {"python": LOOP, "scontrol": SCONTROL, "srun": SRUN, "squeue": SQUEUE, "scancel": SCANCEL}
    for name, body in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    script = place.folder / "slurm_script"  # SLURM runs a copy
    script.write_text((SLURM / "gfpo_loop.sbatch").read_text())
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "OMP", "STUB", "RECIPE"))}
    environment = clean | {
        "PATH": f"{folder}:{os.environ['PATH']}", "STUB": str(place.folder), "PYTHON": str(folder / "python"),
        "SLURM_JOB_ID": JOB_ID, "SLURM_JOB_NODELIST": "alpha[03-04]", "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT), "LOAD": str(place.folder / "start"),
        "QUESTIONS": str(place.data), "WORK": str(place.work), "STUB_HOME": str(ROOT), "MAX_RESTARTS": "1",
        **environment,
    }  # fmt: skip
    with open(place.folder / "out", "w") as out:
        process = subprocess.Popen(
            ["bash", str(script), *arguments], env=environment, cwd=place.folder, stdout=out, stderr=out
        )
    place.started.append(process)
    wait_for(place, "ready", process)
    return process


def wait_for(place, name, process):
    deadline = time.monotonic() + 40
    while not (place.folder / name).exists():
        assert time.monotonic() < deadline and process.poll() in (None, 0, 1, 7, 143), (
            place.folder / "out"
        ).read_text()
        time.sleep(0.01)


def srun_arguments(place):
    return (place.folder / "srun.arguments").read_text().split("\0")[:-1]


def test_the_batch_script_gives_flags_that_exist(program, place):
    process = submit(place, "--rounds", "5", STUB_EXIT="0", VLLM="/opt/my vllm/bin/vllm")
    assert process.wait(20) == 0, (place.folder / "out").read_text()
    script, *given = (place.folder / "arguments").read_text().split("\0")[:-1]
    assert script == str(ROOT / "tools" / "run_gfpo.py")
    commands = checked(program, place, *given)
    options = commands.options
    assert (options.load, options.data, options.save) == (place.folder / "start", place.data, place.work)
    assert options.rounds == 5  # the caller's
    on_host = ["bash", str(SLURM / "on_host.sh")]
    assert commands.launcher() == [*on_host, "ranks", str(place.folder / "bin with space" / "python")]
    assert "examples/recipes/gfpo-32b.yaml" in " ".join(options.further("train"))
    environment = dict(line.split("=", 1) for line in place.lines("environment") if "=" in line)
    assert environment["MASTER_ADDR"] == "10.0.0.3"
    ports = {int(url.rpartition(":")[2].removesuffix("/v1")) for url in options.base_url}
    assert [url.rpartition(":")[0] for url in options.base_url] == ["http://10.0.0.3", "http://10.0.0.4"]
    (port,) = ports
    assert int(environment["MASTER_PORT"]) < 30000 <= port < 32768
    server = server_command(options.serve, place.folder)
    assert server[:6] == [*on_host, "servers", "/opt/my vllm/bin/vllm", "serve", str(place.folder)]
    assert server[server.index("--port") + 1] == str(port)


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_batch_script_stops_the_loop_and_is_requeued_before_the_time_limit(place, number, requeued):
    process = submit(place)
    process.send_signal(number)
    assert process.wait(20) == (0 if requeued else 143), (place.folder / "out").read_text()
    assert place.lines("told") == ["TERM"]
    assert (f"requeue {JOB_ID}" in place.lines("scontrol")) == requeued


def test_a_loop_that_is_done_is_not_requeued(place):
    assert submit(place, STUB_EXIT="0").wait(20) == 0
    assert len(place.lines("starts")) == 1 and f"requeue {JOB_ID}" not in place.lines("scontrol")


def test_a_loop_that_fails_is_tried_again_a_few_times(place):
    assert submit(place, STUB_EXIT="7").wait(20) == 7
    assert len(place.lines("starts")) == 2  # MAX_RESTARTS=1
    assert f"requeue {JOB_ID}" not in place.lines("scontrol")


def test_wrong_input_is_not_tried_again(place):
    process = submit(place, STUB_EXIT="2")
    assert process.wait(20) == 2
    assert len(place.lines("starts")) == 1


def test_a_step_of_ranks_is_started_for_the_loop(place):
    """Its output and its status come back."""
    process = submit(place, STUB_ASK="ranks bash -c echo${IFS}hello;exit${IFS}5")
    assert process.wait(30) == 0, (place.folder / "out").read_text()
    assert place.lines("answer") == ["hello", *place.lines("answer")[1:]] and place.lines("answered") == ["5"]
    arguments = srun_arguments(place)
    assert {"--overlap", "--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(arguments)
    assert str(SLURM / "rank.sh") in arguments


def test_servers_are_one_task_on_each_node(place):
    process = submit(place, STUB_ASK="servers echo serving")
    assert process.wait(30) == 0, (place.folder / "out").read_text()
    assert place.lines("answer") == ["serving"] and place.lines("answered") == ["0"]
    arguments = srun_arguments(place)
    assert {"--overlap", "--ntasks=2", "--ntasks-per-node=1"} <= set(arguments)
    assert str(SLURM / "rank.sh") not in arguments


def test_in_a_container_loop_and_steps_run_in_it(place):
    process = submit(place, STUB_EXIT="0", CONTAINER_IMAGE="ssft.sqsh")
    assert process.wait(30) == 0, (place.folder / "out").read_text()
    arguments = srun_arguments(place)
    assert "--job-name=loop" in arguments and "--container-image=ssft.sqsh" in arguments
    mounts = next(word for word in arguments if word.startswith("--container-mounts=")).partition("=")[2].split(",")
    assert {f"{path}:{path}" for path in (ROOT, place.work, place.folder / "start", place.folder)} <= set(mounts)
    assert str(ROOT / "tools" / "run_gfpo.py") in arguments
