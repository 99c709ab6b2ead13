"""SIGKILL at file operations drawn by a seed: the same command, given again, ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import random

import pytest

from megatron_ssft.formats.run_folder import latest_checkpoint
from tests.helpers import policy_programs
from tests.helpers.campaigns import cases, tell
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.fault_points import run_with_fault
from tests.helpers.policy_runs import write_inputs, write_models
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

pytestmark = pytest.mark.slow

CASES = cases(whole=34, part=2)
"""Kills of each test here."""
LAYOUTS = {
    "one process": (1, {}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
RUN = BASE | {"train_iters": 4, "save_interval": 2, "global_batch_size": 8, "export_hf_at_save": True}


def digests(run):
    """Every file of an export, and of the rest the names; but not those that count starts or carry a time."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() if "hf" in path.parts else ""
        for path in run.rglob("*")
        if path.is_file() and not {"tensorboard", "configs"} & set(path.parts)
    }


def outcome(ranks, body, *arguments):
    """(status, stdout, stderr, operations) of every rank, or None where a rank was killed."""
    try:
        return run_ranks(ranks, body, *arguments, timeout=240)
    except RankFailure as failure:
        assert "died with exit code -9" in str(failure), failure
        return None


def kill_and_repeat(
    folder, command, ranks, words_of, logs_of, seed, *, count=CASES, body=run_with_fault, among=None, between=None
):
    """Runs beside an uninterrupted one, each killed once and then repeated by the same command.

    Args:
        words_of: (run folder, whether it has a checkpoint) to a command line.
        logs_of: a run folder to its logs without times.
        count: how many.
        body: what runs a command with a fault.
        among: which operations may be drawn, by all that there are of a rank; each is tried once, where there are no
            more of them than `count`.
        between: looks at a run folder after the kill.
    """
    whole = folder / "whole"
    results = run_ranks(ranks, body, command, words_of(whole, False), str(whole), timeout=240)
    assert [status for status, *_ in results] == [0] * ranks, results[0][2]
    places = [
        (rank, at) for rank, (*_, done) in enumerate(results) for at in (among(done) if among else range(len(done)))
    ]
    draw, killed = random.Random(seed), 0
    drawn = draw.sample(places, min(count, len(places)))
    for case, (rank, at) in enumerate(drawn):
        run = folder / f"run {case}"
        where = f"rank {rank}, operation {at}: {results[rank][-1][at]}"
        killed += outcome(ranks, body, command, words_of(run, False), str(run), rank, at) is None
        if between is not None:
            between(run, where)
        again = outcome(ranks, body, command, words_of(run, latest_checkpoint(run) is not None), str(run))
        assert [status for status, *_ in again] == [0] * ranks, (where, again[0][2])
        assert logs_of(run) == logs_of(whole), where
        assert digests(run) == digests(whole), where
    assert killed >= 0.8 * (len(drawn) - 1)
    return len(drawn), killed


def tell_kills(what, ranks, outcome_of):
    tried, killed = outcome_of
    tell(f"kills, {what} on {ranks}", tried, f"{killed} came in time, all ended the same")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_set_training_with_exports(tmp_path, layout):
    ranks, overrides = LAYOUTS[layout]
    data = {
        "data_path": write_rows(tmp_path / "train.jsonl", make_rows(12)),
        "data_cache_path": str(tmp_path / "cache"),
    }

    def words_of(run, resumes):
        return flags(RUN | data | overrides | {"save": run} | ({"load": run} if resumes else {}))

    tell_kills("train", ranks, kill_and_repeat(tmp_path, "train", ranks, words_of, logs, layout))


def test_policy_learning(tmp_path):
    run_ranks(1, write_models, str(tmp_path / "models"))
    inputs = write_inputs(tmp_path)
    more = (*policy_programs.ANCHOR, "--export-hf-at-save")

    def words_of(run, resumes):
        return policy_programs.flags(
            tmp_path / "models", inputs, run, *more, load=run if resumes else None, steps=6
        )  # saves after steps 5 and 6

    tell_kills("gfpo", 1, kill_and_repeat(tmp_path, "gfpo", 1, words_of, policy_programs.logs, "gfpo"))
