"""Training programs as processes of their own, to be stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil

from tests.helpers.paths import ROOT


def start_program(program, arguments, ranks=1):
    """A real run in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, program, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=180):
    """(exit status, output), at the latest after the timeout, when everything of it is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            ranks = psutil.Process(process.pid).children(recursive=True)  # torchrun gives each a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            for each in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
    return process.returncode, output


def wait_for_steps(process, run, steps, timeout=120):
    """Until metrics.jsonl has that many lines; the run must not end before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.is_file() and path.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError("the run did not get that far")


def ranks_of_program(program, process, ranks):
    """Process ids of the ranks; torchrun starts each in a session of its own."""
    if ranks == 1:
        return [process.pid]
    children = psutil.Process(process.pid).children()
    pids = [child.pid for child in children if any(program in word for word in child.cmdline())]
    assert len(pids) == ranks
    return pids
