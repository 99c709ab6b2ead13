"""Which processes are ranks, from the variables that launchers set."""

from __future__ import annotations

import pytest

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError
from megatron_ssft.launch import ALONE, Launch, rank_for_messages, this_launch

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
"""What the shell of a batch job of 16 tasks has."""
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
PLACES = {
    "nothing": ({}, ALONE),
    "the shell of a batch job": (BATCH, ALONE),
    "a batch shell that counts as a step": (BATCH | {"SLURM_STEP_ID": "4294967291"}, ALONE),
    "an interactive shell": (BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
    "a shell on the login node": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, ALONE),
    "a task": (STEP | {"SLURM_LOCALID": "3"}, Launch(11, 16, 3)),
    "a task of the hundredth step": (STEP | {"SLURM_STEP_ID": "99"}, Launch(11, 16, 0)),
    "a step smaller than its job": (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ALONE),
    "a step of an older SLURM": ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, Launch(11, 16, 0)),
    "torchrun": (TORCHRUN, Launch(5, 8, 1)),
    "torchrun inside a step": (STEP | TORCHRUN, Launch(5, 8, 1)),
    "torchrun inside a batch shell": (BATCH | TORCHRUN, Launch(5, 8, 1)),
}


@pytest.mark.parametrize("name", PLACES)
def test_only_a_step_or_torchrun_makes_ranks(name):
    environment, place = PLACES[name]
    assert this_launch(environment) == place


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE ''"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2: must lie below WORLD_SIZE, which is 2"),
        (STEP | {"SLURM_PROCID": "16"}, "SLURM_PROCID 16: must lie below SLURM_STEP_NUM_TASKS"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK '-1'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(environment, text):
    with pytest.raises(UserError, match=f"^{text}"):
        this_launch(environment)


def set_only(monkeypatch, environment):
    for name in {**BATCH, **STEP, **TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [(BATCH | {"SLURM_PROCID": "3"}, ""), (STEP, "[rank 11] "), ({"RANK": "x", "WORLD_SIZE": "2"}, "")],
)
def test_errors_are_told_by_the_same_rank(environment, expected, monkeypatch, capsys):
    def fail():
        raise UserError("wrong")

    set_only(monkeypatch, environment)
    monkeypatch.setattr("megatron_ssft.cli.entry.GRACE_SECONDS", 0.0)
    assert run_command(fail) == 2
    assert capsys.readouterr().err == f"{expected}wrong\n"
    assert (rank_for_messages() == 0) == (expected == "")
