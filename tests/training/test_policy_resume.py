"""Killed anywhere and resumed, policy learning ends as if nothing had happened: the same logs, the same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.errors import UserError
from megatron_ssft.objectives.policy import reference
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.signals import StopSignal
from megatron_ssft.training.startup import complete_policy_values
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.policy_programs import (
    ANCHOR,
    STEPS,
    TP2,
    assert_same_weights,
    finished,
    flags,
    logs,
    ranks_of,
    run_body,
    start,
)
from tests.helpers.processes import finish, wait_for_steps

# -- killed while it trains ----------------------------------------------------------------------------------------


# With three steps a set of drawn tags, checkpoints and stops are in the middle of one.
SAMPLED = ("--objective", "gfpo-sampled", "--policy-epochs", "3", "--anchor-completions", "10")
INTERRUPTED = {
    "exact": (1, "tied special", ANCHOR, ()),
    "sampled": (
        2,
        "untied special",
        (*SAMPLED, "--trainable", "last-1"),
        (*TP2, "--sequence-parallel", "--use-distributed-optimizer"),
    ),
    "grpo": (1, "untied text", ("--objective", "grpo", "--kl-coef", "0.1"), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTED)
def test_stopped_killed_and_resumed(models, inputs, tmp_path, name):
    ranks, kind, objective, layout = INTERRUPTED[name]
    more = (*objective, *layout)
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(ranks, run_body, flags(models, inputs, whole, *more, kind=kind))

    process = start(flags(models, inputs, run, *more, kind=kind), ranks)
    wait_for_steps(process, run, 2)
    for pid in ranks_of(process, ranks):  # as SLURM does: to every task, which need not all be at the same step
        os.kill(pid, signal.SIGTERM)
    status, output = finish(process)
    assert status == 0, output
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 2 <= done < STEPS and f"stopped by SIGTERM at step {done}" in output
    assert (run / "latest_checkpointed_iteration.txt").read_text() == str(done)
    assert finished(run) is None

    again = flags(models, inputs, run, *more, kind=kind, load=run)
    process = start(again, ranks)
    wait_for_steps(process, run, max(done + 1, 6))
    for pid in [*ranks_of(process, ranks), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert len((run / "metrics.jsonl").read_text().splitlines()) < STEPS
    assert finished(run) is None

    status, output = finish(start(again, ranks))
    assert status == 0, output
    assert f"finished at step {STEPS} of {STEPS}" in output and "steps 1 to" not in output
    assert logs(run) == logs(whole)
    assert finished(run) == finished(whole) == {"iteration": STEPS, "reason": "done"}
    iterations = {json.loads(line)["iteration"] for line in (run / "policy.jsonl").read_text().splitlines()}
    assert iterations == (set() if name == "grpo" else {0, 7, 14, STEPS})
    assert_same_weights(flags(models, inputs, tmp_path / "unused", *objective, kind=kind), run, whole)


# -- killed before the first checkpoint ----------------------------------------------------------------------------


def die_in_the_reference(argv, place):
    """SIGKILL for every rank while the reference is being written, or two steps after that. Runs on every rank."""
    if place == "steps":
        step = Trainer.train_step

        def train_step(self):
            if self.iteration == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        Trainer.train_step = train_step
    else:
        reference._save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run_body(argv)


@pytest.mark.parametrize("place", ["reference", "steps"])
def test_killed_before_the_first_checkpoint(models, inputs, tmp_path, place):
    """The original command starts anew and ends the same."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(1, run_body, flags(models, inputs, whole, *ANCHOR, steps=4))
    argv = flags(models, inputs, run, *ANCHOR, steps=4)
    with pytest.raises(RankFailure, match="died"):
        run_ranks(1, die_in_the_reference, argv, place)
    assert not list(run.glob("iter_*")) and finished(run) is None
    assert (run / "reference").is_dir() == (place == "steps")
    run_ranks(1, run_body, argv)
    assert logs(run) == logs(whole)
    assert finished(run) == {"iteration": 4, "reason": "done"}
    assert not list(run.glob(".*"))
    assert_same_weights(flags(models, inputs, tmp_path / "unused", *ANCHOR), run, whole)


def run_stopped(argv):
    """A SIGTERM comes before the first step. Runs on every rank."""
    config, _ = parse_arguments("", GFPOConfig, argv, complete_policy_values)
    trainer, stop = Trainer(config, initialize_topology(config.run)), StopSignal()
    signal.raise_signal(signal.SIGTERM)
    trainer.run(stop)
    destroy_topology()


@pytest.mark.parametrize("layout", [(), ("--use-distributed-optimizer",)], ids=["plain", "distributed"])
def test_stopped_before_the_first_step(models, inputs, tmp_path, layout):
    """Nothing is saved, so the original command starts anew."""
    argv = flags(models, inputs, tmp_path / "run", *ANCHOR, *layout, steps=2)
    run_ranks(1, run_stopped, argv)
    assert not list((tmp_path / "run").glob("iter_*")) and finished(tmp_path / "run") is None
    run_ranks(1, run_body, argv)
    assert finished(tmp_path / "run") == {"iteration": 2, "reason": "done"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "policy.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["id"]) for row in lines] == [(i, f"q{q}") for i in (0, 2) for q in range(6)]


# -- resumed otherwise than it was started -------------------------------------------------------------------------


def outcome(argv):
    """None, or what the user is told. Runs on every rank."""
    try:
        run_body(argv)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def short(models, inputs, tmp_path_factory):
    """A run of 4 steps that has ended."""
    run = tmp_path_factory.mktemp("short") / "run"
    run_ranks(1, run_body, flags(models, inputs, run, *ANCHOR, steps=4))
    return run


OTHERWISE = {
    "rewards": (ANCHOR, "resume with the same"),
    "objective": (("--objective", "gfpo-sampled", "--anchor-completions", "10"), "--objective gfpo-exact"),
    "trainable": ((*ANCHOR, "--trainable", "last-1"), "--trainable all"),
    "optimizer": ((*ANCHOR, "--use-distributed-optimizer"), "--use-distributed-optimizer"),
    "no anchor": (("--objective", "gfpo-exact", "--anchor", "none"), "resume"),
    "anchor's tokens": ((*ANCHOR, "--anchor-top-k", "5"), "--anchor-top-k 32"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_resumed_otherwise(models, inputs, short, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    more, message = OTHERWISE[name]
    files = dict(inputs)
    if name == "rewards":
        folder = tmp_path / "changed"
        shutil.copytree(Path(inputs["rewards"]).parent, folder)
        files["rewards"] = str(folder / "REWARDS.jsonl")
        rows = [json.loads(line) for line in Path(files["rewards"]).read_text().splitlines()]
        rows[0]["sum"][0] = (rows[0]["sum"][0] + 1) % 3
        Path(files["rewards"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((told),) = run_ranks(1, outcome, flags(models, files, run, *more, load=run, steps=8))
    assert told is not None and message in told and "\n" not in told, told
    assert logs(run) == logs(short)


def test_an_anchor_cannot_be_added(models, inputs, tmp_path):
    """What the reference says of completions was not kept."""
    run = tmp_path / "run"
    run_ranks(1, run_body, flags(models, inputs, run, "--objective", "gfpo-exact", "--anchor", "none", steps=2))
    (told,) = run_ranks(1, outcome, flags(models, inputs, run, *ANCHOR, load=run, steps=4))
    assert told is not None and "anchor" in told and "\n" not in told, told


def test_a_finished_run_goes_on(models, inputs, short, tmp_path):
    """With more steps it becomes the longer run: also where that would have put more completions aside."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    few = ("--rescore-completions", "15", "--objective", "gfpo-exact", "--anchor-completions", "5")
    run_ranks(1, run_body, flags(models, inputs, run, *few, steps=4))
    assert finished(run) == {"iteration": 4, "reason": "done"}
    pool = (run / "reference" / "0_places.npy").read_bytes()
    run_ranks(1, run_body, flags(models, inputs, run, *few, steps=10, load=run))
    assert finished(run) == {"iteration": 10, "reason": "done"}
    assert (run / "reference" / "0_places.npy").read_bytes() == pool
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    # Where there are no more completions to put aside the run is the longer one.
    run_ranks(1, run_body, flags(models, inputs, whole, *ANCHOR, steps=9))
    shutil.copytree(short, tmp_path / "longer")
    run_ranks(1, run_body, flags(models, inputs, tmp_path / "longer", *ANCHOR, steps=9, load=tmp_path / "longer"))
    assert logs(tmp_path / "longer")[0] == logs(whole)[0]
    assert_same_weights(flags(models, inputs, tmp_path / "unused", *ANCHOR), tmp_path / "longer", whole)


def test_a_finished_run_is_left_alone(models, inputs, short, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    run_ranks(1, run_body, flags(models, inputs, run, *ANCHOR, steps=4, load=run))
    assert logs(run) == logs(short) and finished(run) == finished(short)
    (told,) = run_ranks(1, outcome, flags(models, inputs, run, *ANCHOR, steps=4))
    assert "already holds" in told and logs(run) == logs(short)


# -- stale rewards -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stale_rewards_end_the_run(models, inputs, tmp_path):
    run = tmp_path / "run"
    far = ("--objective", "gfpo-exact", "--anchor", "none", "--lr", "3e-2", "--on-stale-rewards", "stop")
    argv = flags(models, inputs, run, *far)
    status, output = finish(start(argv))
    assert status == 0, output
    assert "stale rewards" in output
    assert finished(run) == {"iteration": 4, "reason": "stale rewards"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[-1]["effective_sample_size"] < 0.5
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert {json.loads(line)["iteration"] for line in (run / "policy.jsonl").read_text().splitlines()} == {0, 4}
    before = logs(run)
    run_ranks(1, run_body, flags(models, inputs, run, *far, load=run))  # still stale
    assert logs(run) == before and finished(run) == {"iteration": 4, "reason": "stale rewards"}


def test_stale_rewards_need_not_end_the_run(models, inputs, tmp_path):
    run = tmp_path / "run"
    far = ("--objective", "gfpo-exact", "--anchor", "none", "--lr", "3e-2")
    run_ranks(1, run_body, flags(models, inputs, run, *far, steps=6))
    assert finished(run) == {"iteration": 6, "reason": "done"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "effective_sample_size" in row] == [4, 6]  # and at the end
    assert rows[3]["effective_sample_size"] < 0.5
