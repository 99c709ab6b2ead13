"""A SLURM cluster on this host: one slurmctld and a slurmd per node, as root, with GPUs that are not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.paths import ROOT

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = tuple(f"n{i}" for i in range(1, 7))
ADDRESSES = {node: f"127.0.0.{number}" for number, node in enumerate(NODES, start=1)}
"""Every node has an address of its own, so that the servers of one job do not share ports."""
_CONFIG = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=1
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM that are not installed, or root's rights."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return missing or (["root"] if os.geteuid() else [])


@dataclass
class Cluster:
    """Starts the daemons in a `with` block; all commands of SLURM are run with `environment`."""

    folder: Path
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> Cluster:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        config = self.folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        port, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={ADDRESSES[node]} Port={own} CPUs=64 Gres=gpu:8"
            for node, own in zip(NODES, ports, strict=True)
        )
        # Ports of jobs follow from their ids, and two clusters may run beside each other.
        first_job = 1 + 50 * (port % 400)
        config.write_text(_CONFIG.format(host=host, folder=self.folder, port=port, nodes=nodes, first_job=first_job))
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-7]\n")
        for gpu in range(8):
            (self.folder / f"gpu{gpu}").touch()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MASTER", "OMP"))}
        self.environment = clean | {"SLURM_CONF": str(config), "PATH": f"{clean['PATH']}:/usr/sbin"}
        _start_munge()
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        states = ["idle"] * len(NODES)
        self.wait(lambda: self.run("sinfo", "-h", "-N", "-o", "%t").split() == states, "the nodes are idle")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root")
            self.run("scancel", "--user=root")
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.wait(lambda: not self.run("squeue", "--noheader"), "all jobs have ended", 20)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in psutil.process_iter():  # what a job has left behind holds its ports
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()

    def _start(self, *words: str) -> subprocess.Popen:
        log = open(self.folder / f"{words[0]}.out", "ab")  # noqa: SIM115
        process = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.processes.append(process)
        return process

    def run(self, *words: str) -> str:
        """Output of a command of SLURM that has to succeed."""
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        return result.stdout

    def wait(self, condition, what: str, seconds: float = 60.0):
        """Until `condition` answers something true, which is returned."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}\n{self.story()}"
            time.sleep(0.2)
        return answer

    def story(self) -> str:
        """What a failed test needs to be understood."""
        outputs = [f"--- {path}\n{path.read_text()[-6000:]}" for path in sorted(self.folder.glob("*.out"))]
        return "\n".join([self.run("scontrol", "show", "jobs"), *outputs])

    # -- jobs ----------------------------------------------------------------------------------------------------

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit a script of examples/slurm from the repository's folder; the job's id."""
        words = ["sbatch", "--parsable", f"--output={self.folder}/%x-%j.out", *options, f"examples/slurm/{script}"]
        result = subprocess.run(
            [*words, *arguments], cwd=ROOT, env=self.environment | environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, ..."""
        text = self.run("scontrol", "show", "job", job, "--oneliner").splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_file(self, path: Path, seconds: float = 120.0) -> None:
        self.wait(path.exists, f"{path} is there", seconds)

    def end_of(self, job: str, seconds: float = 180.0) -> dict[str, str]:
        """The fields of a job that has ended for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(lambda: self.fields(job)["JobState"] in over, f"job {job} ends", seconds)
        return self.fields(job)

    def output(self, job: str) -> str:
        """All that a job has printed, over its requeues."""
        return Path(self.fields(job)["StdOut"]).read_text()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start_munge() -> None:
    """The host's munged, which is left running: others may use it too."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    folder = Path("/run/munge")
    folder.mkdir(mode=0o755, exist_ok=True)
    shutil.chown(folder, "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)
