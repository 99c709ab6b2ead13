"""Steps of a run that are counted and not kept: on a simulated rank of a job of any size, or on real ranks.

The objective decides what a step trains, as in a run. Weights are not loaded, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_ssft.config import SSFTConfig, TrainingRun
from megatron_ssft.errors import UserError
from megatron_ssft.objectives.objective import StepContext
from megatron_ssft.objectives.registry import objective_of
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.simulated.counters import Counters
from megatron_ssft.parallel.simulated.gpu import Kind
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.simulated.simulate import AUTOCAST, CountedEngine, simulated_rank
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.tokenizers.vocabulary import build_vocabulary


def simulate_run(
    config: TrainingRun,
    world_size: int,
    rank: int,
    *,
    passed_over: int = 0,
    steps: int = 1,
    kind: Kind = "gpu",
    nodes_of: int = 8,
    with_checkpoint: bool = False,
) -> SimulatedStep:
    """A step of a run, of one rank of a job that is not there: the last of `steps` after those that are passed over.

    Args:
        passed_over: steps whose data is left out.
        steps: the first one is like all others: the optimizer's state is there.
        kind: whose kernels are simulated.
        nodes_of: ranks on a node.
        with_checkpoint: save, export and load as well, after the last step.

    Raises:
        UserError: the configuration or the data is not right, or it cannot be simulated.
    """
    if isinstance(config, SSFTConfig) and config.matching.matching_precision == "bf16":
        raise UserError(AUTOCAST)
    with simulated_rank(config.run, world_size, rank, kind=kind, nodes_of=nodes_of) as simulated:
        config = dataclasses.replace(config, run=simulated.config)
        return count_steps(
            config,
            simulated.topology,
            simulated.gpu,
            steps,
            passed_over=passed_over,
            process_groups=simulated.process_groups,
            with_checkpoint=with_checkpoint,
        )


def count_steps(
    config: TrainingRun,
    topology: Topology,
    counters: Counters,
    steps: int,
    *,
    passed_over: int = 0,
    process_groups: int = 0,
    with_checkpoint: bool = False,
    fill: Callable[[Engine], None] | None = None,
) -> SimulatedStep:
    """The last of so many steps of this rank. Called inside the `with` block of the counters. Collective.

    Args:
        fill: gives the model weights, where there are any.
    """
    vocabulary = build_vocabulary(config.run, config.start)
    objective = objective_of(config)(config, vocabulary, topology)
    engine = CountedEngine(config.run, topology, vocabulary.size, vocabulary.tags.row_ids, counters)
    if fill is not None:
        fill(engine)
    engine.start(objective.last_layers)
    objective.suppose_begun()
    objective.pass_over(passed_over)
    cost_tokens = config.cost_tokens_per_microbatch if isinstance(config, SSFTConfig) else None
    planner = Planner(config.run, vocabulary.size, topology.dp_size, cost_tokens)
    train_iters = objective.train_iters(0)
    for iteration in range(steps):
        counters.take_sections()
        context = StepContext(iteration, train_iters, engine, planner)
        engine.train(objective.decide(context).terms, config.run.training.lr)
    return engine.account(process_groups, with_checkpoint=with_checkpoint)
