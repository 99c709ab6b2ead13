"""How this process was started: alone, by torchrun, or as a task of a SLURM step. Everybody who asks, asks here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ssft.errors import UserError

_LARGEST_STEP = 0xFFFF_FFF0
"""SLURM numbers ordinary steps up to here; the shell of a batch or interactive job has a number above it, or none."""


@dataclass(frozen=True)
class Launch:
    """This process among those of its job."""

    rank: int
    world_size: int
    local_rank: int
    """Number among the processes on this node."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ALONE = Launch(0, 1, 0)


def this_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place by torchrun's variables, else by those of its SLURM step, else alone.

    Only a step makes ranks. The shell of a batch job has SLURM_PROCID=0 and the SLURM_NTASKS of the whole job as well,
    and is no rank of anything: what it starts without `srun` is alone. Raises UserError for numbers that make no sense.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        return _launch(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if is_slurm_task(env):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        return _launch(env, "SLURM_PROCID", size, "SLURM_LOCALID")
    return ALONE


def is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether `srun` started this process, as a task of an ordinary step."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) <= _LARGEST_STEP


def rank_for_messages() -> int:
    """This process's rank; 0 where that cannot be known, so that somebody speaks."""
    try:
        return this_launch().rank
    except UserError:
        return 0


def _launch(env: Mapping[str, str], rank: str, size: str, local: str) -> Launch:
    numbers = []
    for name in (rank, size, local):
        text = env.get(name, "0" if name == local else "")
        if not text.isdecimal():
            raise UserError(
                f"{name} {text!r}: must be a whole number, as {rank} is set; start the program with torchrun or srun, "
                f"or unset {rank} where it is to run alone"
            )
        numbers.append(int(text))
    launch = Launch(*numbers)
    if launch.rank >= launch.world_size:
        raise UserError(
            f"{rank} {launch.rank}: must lie below {size}, which is {launch.world_size}; start the program with "
            "torchrun or srun"
        )
    return launch
