"""Two jobs in one run folder: one is refused and names the other, and what the other writes is what it writes alone."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import time

import pytest

from tests.helpers.campaigns import cases, tell
from tests.helpers.processes import finish, start_program, wait_for_steps
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

pytestmark = pytest.mark.slow

start = functools.partial(start_program, "pretrain_ssft.py")
VALUES = BASE | {"train_iters": 12, "save_interval": 3}
PAIRS = cases(whole=12, part=1)


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


def assert_refused(outcome, run, *further):
    """One line says who has the folder; or, where that job had already ended, what else it says."""
    status, output = outcome
    words = "|".join([r"is in use by process \d+ on ", *further])
    assert status != 0 and re.search(rf"^--save {re.escape(str(run))}: ({words})", output, re.MULTILINE), output


def contents(run):
    return sorted(path.name for path in run.iterdir() if path.name not in ("tensorboard", "config.yaml"))


@pytest.mark.parametrize("number", range(PAIRS))
def test_two_starts(data, alone, tmp_path, number):
    """One after the other by up to a second, on one rank or two each."""
    draw = random.Random(number)
    run = tmp_path / "run"
    words = flags(VALUES | data | {"save": run})
    pair = []
    for ranks, wait in ((draw.choice((1, 2)), draw.random()), (draw.choice((1, 2)), 0.0)):
        pair.append(start([*words, "--tensor-model-parallel-size", str(ranks)], ranks))
        time.sleep(wait)
    refused = [outcome for outcome in [finish(process) for process in pair] if outcome[0]]
    assert len(refused) == 1, refused
    assert_refused(refused[0], run, "already holds")
    assert contents(run) == contents(alone)
    steps = [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 13)]
    tell("pairs of jobs", 1, "one refused, the other as if alone")


def test_two_resumes_and_a_start_while_one_lives(data, alone, tmp_path):
    run = tmp_path / "run"
    words = flags(VALUES | data | {"save": run})
    first = start(words)
    wait_for_steps(first, run, 4)
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    resume = [*words, "--load", str(run)]
    others = [start(resume), start(words)]
    refused = [finish(process) for process in others]
    for status, output in refused:
        assert_refused((status, output), run)
        assert status == 2 and f"process {first.pid} on " in output and "Traceback" not in output
    first.kill()
    first.communicate()
    for outcome in [finish(process) for process in [start(resume), start(resume)]]:
        if outcome[0]:  # otherwise it did the work, or came when the other had done it
            assert_refused(outcome, run)
    assert logs(run) == logs(alone) and contents(run) == contents(alone)
