"""A step on simulated GPUs, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_ssft.booking.quiet import ignore_warnings
from megatron_ssft.booking.step_time import with_gathered_weights
from megatron_ssft.config import TrainingRun
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.topology import rank_at
from megatron_ssft.training.rehearsal import simulate_run

Result = TypeVar("Result", covariant=True)


class Task(Protocol[Result]):
    """Something to simulate."""

    def run(self) -> Result: ...


@dataclass(frozen=True)
class Job:
    """One rank of a job, and the step that it is to run."""

    config: TrainingRun
    world_size: int
    nodes_of: int
    stage: int
    dp_rank: int = 0
    passed_over: int = 0
    """Steps before it."""

    def run(self) -> SimulatedStep:
        """Simulate it in this process. Raises UserError."""
        rank = rank_at(self.config.run.parallel, self.world_size, self.stage, self.dp_rank)
        step = simulate_run(self.config, self.world_size, rank, passed_over=self.passed_over, nodes_of=self.nodes_of)
        return with_gathered_weights(step)


def simulated_stages(stages: int) -> list[int]:
    """The stages that are simulated: the first, the second and the last.

    Those between have the second one's layers and keep fewer microbatches, so they need less.
    """
    return sorted({0, min(1, stages - 1), stages - 1})


def run_all(tasks: Sequence[Task[Result]]) -> list[Result]:
    """Run the tasks in processes, as many as there are CPUs; results in their order. Raises UserError."""
    spawn = multiprocessing.get_context("spawn")  # a simulation changes torch; a fork would inherit its threads
    workers = max(1, min(len(tasks), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=ignore_warnings) as pool:
        return list(pool.map(_run, tasks))


def _run(task: Task[Result]) -> Result:
    return task.run()
