"""Two jobs in one run folder: one is refused and names the other, and what the other writes is what it writes alone."""

from __future__ import annotations

import functools
import os
import re
import signal

import pytest

from tests.helpers.processes import finish, start_program, wait_for_steps
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

pytestmark = pytest.mark.slow

start = functools.partial(start_program, "pretrain_ssft.py")
VALUES = BASE | {"train_iters": 12, "save_interval": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {"data_path": write_rows(folder / "train.jsonl", make_rows()), "data_cache_path": str(folder / "cache")}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The folder of the same run without company."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert finish(start(flags(VALUES | data | {"save": run})))[0] == 0
    return run


def assert_one_refusal(outcomes, run):
    """One of the jobs ended well; the others each said who has the folder, in one line."""
    assert sorted(status for status, _ in outcomes) == [0, *[2] * (len(outcomes) - 1)], outcomes
    for status, output in outcomes:
        if status:
            last = output.strip().splitlines()[-1]
            assert re.search(rf"--save {re.escape(str(run))}: is in use by process \d+ on ", last), output
            assert "Traceback" not in output


def contents(run):
    return sorted(path.name for path in run.iterdir() if path.name not in ("tensorboard", "config.yaml"))


def test_two_starts(data, alone, tmp_path):
    run = tmp_path / "run"
    words = flags(VALUES | data | {"save": run})
    assert_one_refusal([finish(process) for process in [start(words), start(words)]], run)
    assert logs(run) == logs(alone) and contents(run) == contents(alone)


def test_two_resumes_and_a_start_while_one_lives(data, alone, tmp_path):
    run = tmp_path / "run"
    words = flags(VALUES | data | {"save": run})
    first = start(words)
    wait_for_steps(first, run, 4)
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    resume = [*words, "--load", str(run)]
    others = [start(resume), start(words)]
    refused = [finish(process) for process in others]
    assert [status for status, _ in refused] == [2, 2] and f"process {first.pid} on " in refused[0][1]
    first.kill()
    first.communicate()
    assert_one_refusal([finish(process) for process in [start(resume), start(resume)]], run)
    assert logs(run) == logs(alone) and contents(run) == contents(alone)
