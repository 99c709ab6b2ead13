"""No process of a test outlives it: not where the test ends, nor where it is killed itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.distributed import RankFailure, lead_group, run_ranks
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

WITHIN = 40.0
"""Seconds: the first start of ranks takes many on a busy machine."""


def stop_with_a_child(folder):
    """Write the ids of this rank and of a child, then stop: a stopped process can do nothing for its end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(f"{folder}/ids.{os.getpid()}", "w") as file:
        file.write(f"{os.getpid()} {child.pid} ")
    os.rename(file.name, f"{folder}/ids")
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_beside_a_failure(folder):
    """The second rank stops; the first fails once it has."""
    if os.environ["RANK"] == "1":
        stop_with_a_child(folder)
    wait_for(lambda: os.path.exists(f"{folder}/ids"))
    raise ValueError("the first rank fails")


def wait_for(condition):
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left_of(folder):
    """Those of the processes that are still there."""
    left = []
    for pid in (folder / "ids").read_text().split():
        try:
            process = psutil.Process(int(pid))
            left += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.NoSuchProcess:
            pass
    return left


@pytest.fixture(autouse=True)
def clean(tmp_path):
    """What this test is about must not be left by it, when it fails."""
    yield
    for process in left_of(tmp_path) if (tmp_path / "ids").exists() else []:
        process.kill()


def test_ranks_and_their_children_end_with_the_test(tmp_path):
    with pytest.raises(RankFailure, match="the first rank fails"):
        run_ranks(2, stop_beside_a_failure, str(tmp_path))
    wait_for(lambda: not left_of(tmp_path))


STRUCK = """
from pathlib import Path
from tests.helpers import struck_ranks
struck_ranks.run_struck(Path({folder!r}), 1, [], "training", 0, 0)
"""
RANKS = """
from tests.helpers.distributed import run_ranks
from tests.faults.test_no_survivors import stop_with_a_child
run_ranks(1, stop_with_a_child, {folder!r}, timeout=600.0)
"""
# run_struck runs `train`; here it runs what writes down its ids and stops.
PREPARED = """
import tests.helpers.struck_ranks as module
from tests.faults import test_no_survivors
module._run = test_no_survivors.run_in_its_place
"""


def run_in_its_place(rank, world_size, port, output, words, strike, variables=None):
    """As a rank of `run_struck` begins, and then stops."""
    lead_group()
    stop_with_a_child(os.path.dirname(output))


@pytest.mark.parametrize("script", [RANKS, PREPARED + STRUCK], ids=["run_ranks", "run_struck"])
def test_ranks_and_their_children_end_with_a_test_that_is_killed(tmp_path, script):
    path = tmp_path / "driver.py"
    path.write_text(
        "if __name__ == '__main__':\n" + "".join(f"    {x}\n" for x in script.format(folder=str(tmp_path)).splitlines())
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, str(path)], cwd=ROOT, env=environment, start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "ids").exists() or driver.poll() is not None)
        time.sleep(0.5)
        assert len(left_of(tmp_path)) == 2
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not left_of(tmp_path))
