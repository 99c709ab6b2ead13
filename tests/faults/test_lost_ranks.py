"""A rank that is stopped, dead or stuck, anywhere: the others end within the stated time and say who and where."""

from __future__ import annotations

import random
import re
import signal

import pytest

from tests.helpers.campaigns import cases, tell
from tests.helpers.struck_ranks import run_struck
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows

pytestmark = pytest.mark.slow

LIMIT = 8.0
"""Seconds of --distributed-timeout-minutes: several times what anything takes here on a busy machine."""
LEAVING = 20.0
"""Seconds to say it and go, on a busy machine."""
STOPPED, DEAD, STUCK = signal.SIGSTOP, signal.SIGKILL, 0
CASES = [
    ("meeting", 1, STOPPED, 1, 2, None),
    ("meeting", 2, STOPPED, 1, 3, None),
    ("meeting", 1, DEAD, 1, 3, None),
    ("joining the groups", 2, DEAD, 1, 3, "starting"),
    ("reading the data", 0, STOPPED, 1, 2, "starting"),
    ("building the model", 1, STOPPED, 1, 2, "starting"),
    ("between steps", 1, STOPPED, 3, 2, "step 2, between steps"),
    ("scoring", 1, STOPPED, 4, 2, r"step \d, (scoring|training)"),
    ("training", 1, DEAD, 3, 2, "step 3, training"),
    ("writing the log", 0, STOPPED, 2, 2, "step 2, writing the log"),
    ("writing the log", 0, STUCK, 2, 2, "step 2, writing the log"),
    ("writing the log", 0, DEAD, 2, 2, "step 2, writing the log"),
    ("saving", 1, STOPPED, 1, 2, "step 2, saving a checkpoint"),
    ("publishing", 0, STOPPED, 1, 2, "step 2, saving a checkpoint"),
    ("between steps", 2, DEAD, 2, 3, "step 1, between steps"),
    ("training", 0, DEAD, 3, 3, "step 3, training"),
    ("ending", 1, DEAD, 1, 2, "step 6, ending"),
    ("ending", 0, STOPPED, 1, 2, "step 6, ending"),
    ("ending", 2, DEAD, 1, 3, "step 6, ending"),
]
"""Place, rank, what happens to it at its n-th call there, n, number of ranks, what is said of it."""
CHOSEN = random.Random(16).sample(CASES, cases(whole=len(CASES), part=2))
OF_TORCH = re.compile(r"(\[rank\d+\]:)?\s*\[?[WEIF]\d{4} \d\d:\d\d:\d\d")
"""How a line of torch's own log begins. Where the rank that hosts its store is lost, it warns of that on its own, and
the level that would silence it hides its other warnings too; so such lines stay, beside the one that is ours."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    values = BASE | {
        "train_iters": 6,
        "save_interval": 2,
        "distributed_timeout_minutes": LIMIT / 60,
        "data_path": write_rows(folder / "train.jsonl", make_rows()),
        "data_cache_path": str(folder / "cache"),
    }
    return flags(values)


@pytest.mark.parametrize(("place", "rank", "blow", "nth", "world", "last_seen"), CHOSEN)
def test_a_lost_rank_takes_the_job_down_in_time_and_by_name(words, tmp_path, place, rank, blow, nth, world, last_seen):
    ended = run_struck(tmp_path, world, [*words, "--save", str(tmp_path / "run")], place, rank, blow, nth)
    for each in ended.values():
        assert each.status == 75, ended
        assert each.seconds < LIMIT + LEAVING
        assert "Traceback" not in each.output
    outputs = [each.output for each in ended.values()]
    if blow == STUCK:
        outputs.append((tmp_path / f"rank{rank}.txt").read_text())  # its own threads see it, too
    lines = [line for output in outputs for line in output.splitlines() if not OF_TORCH.match(line)]
    said = [line for line in lines if f"rank {rank} " in line]
    assert len(said) == 1, ended
    if last_seen is None:
        assert f"rank {rank} of {world} did not answer" in said[0]
    else:
        assert re.search(rf"rank {rank} \(process \d+ on .*\), last seen at {last_seen}", said[0]), said
    tell("ranks lost or stuck", 1, f"the others ended within {LIMIT + LEAVING:.0f} s and said who and where")


def test_a_stopped_rank_is_missed_during_slow_work_of_another(words, tmp_path):
    """The first rank may take long; that a third one is stopped meanwhile does not wait for it."""
    ended = run_struck(tmp_path, 3, [*words, "--save", str(tmp_path / "run")], "opening the data", 2, STOPPED)
    assert [each.status for each in ended.values()] == [75, 75], ended
    assert max(each.seconds for each in ended.values()) < LIMIT + LEAVING
    tell("ranks lost or stuck", 1, f"the others ended within {LIMIT + LEAVING:.0f} s and said who and where")
