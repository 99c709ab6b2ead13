"""Closed formulas for a step of any layout, from slices of the model: a few layers of it, simulated.

What a rank keeps and does is linear in its layers, and nearly so in the tokens of a microbatch. So two slices of
different depth, with one microbatch of as many tokens as the longest, give the coefficients for every number of layers,
stages and data-parallel ranks. Tensor parallelism and recomputation need slices of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ssft.booking.memory import STATE
from megatron_ssft.booking.step_time import ring_bytes
from megatron_ssft.booking.survey import Survey
from megatron_ssft.config import RunConfig, SSFTConfig
from megatron_ssft.config.flags import with_values
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared, weighted_nll
from megatron_ssft.parallel.simulated.records import Collective, Copies, Flops, Memory, Part, Section, SimulatedStep
from megatron_ssft.parallel.simulated.simulate import CountedEngine, simulate
from megatron_ssft.records import (
    Assignment,
    ForkingTokens,
    Microbatch,
    ModelInput,
    QuestionBatch,
    QuestionVisit,
    Size,
    TokenizedSet,
)
from megatron_ssft.scheduling.planner import Planner

DEPTHS = (2, 4)
"""Layers of the two slices."""
_PROMPT = 8


@dataclass(frozen=True)
class SliceJob:
    """The slices of one tensor-parallel size and one way of recomputing."""

    config: SSFTConfig
    """Of the layout, of which only these two matter."""
    nodes_of: int
    tokens: int
    """In the microbatch."""
    vocab_size: int
    forking_rows: tuple[int, ...]

    def run(self) -> Slices:
        """Simulate them in this process. Raises UserError."""
        return Slices(self.tokens, *(self._simulate(depth) for depth in DEPTHS))

    def _simulate(self, depth: int) -> SimulatedStep:
        changes = {
            "num_layers": depth,
            "pipeline_model_parallel_size": 1,
            "num_layers_per_virtual_pipeline_stage": None,
            "max_tokens_per_microbatch": None,
        }
        run = with_values(self.config, changes).run
        batch = _batch(self.tokens)
        tags = ForkingTokens(("",), ((0,),), "text")
        planned = Planner(run, self.vocab_size, 1).plan_sequences(batch, [Assignment((0,))], tags)

        def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
            return model_input, (model_input.weights,)

        def step(engine: CountedEngine) -> None:
            engine.score(planned).nll_sums()
            engine.train([LossTerm(planned, prepare, weighted_nll)], lr=0.0)

        world_size = run.parallel.tensor_model_parallel_size
        return simulate(run, world_size, 0, self.vocab_size, self.forking_rows, step, nodes_of=self.nodes_of)


def _batch(tokens: int) -> QuestionBatch:
    """One trace that makes so many tokens, with a prompt and a tag of one token."""
    ids = np.zeros(tokens - _PROMPT, dtype=np.int32)
    example = TokenizedSet("", "", 1, np.zeros(_PROMPT, dtype=np.int32), (ids,), (None,))
    return QuestionBatch((QuestionVisit(0, 0),), (example,))


@dataclass(frozen=True)
class Linear:
    """Of no layer, and of each."""

    base: float
    each: float

    def of(self, layers: float, base: float = 1.0) -> float:
        """With so many layers, and so much of the rest."""
        return self.base * base + self.each * layers


@dataclass(frozen=True)
class Slices:
    """What two depths of a model take."""

    tokens: int
    shallow: SimulatedStep
    deep: SimulatedStep

    def linear(self, figure: Callable[[SimulatedStep], float]) -> Linear:
        """A figure of a step, for any number of layers."""
        shallow, deep = figure(self.shallow), figure(self.deep)
        each = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
        return Linear(shallow - DEPTHS[0] * each, each)

    @property
    def growing(self) -> Linear:
        """Bytes at the peak of training beside weights, gradients and optimizer."""
        return self.linear(_growing)


def estimate(run: RunConfig, world_size: int, nodes_of: int, planned: Survey, slices: Slices) -> SimulatedStep:
    """The heaviest step of a layout as it would be simulated, on a rank that is the first and the last stage in one.

    The first stage keeps the most microbatches, the last has the head to compute; either is as full as this at most.
    """
    parallel, model = run.parallel, run.model
    assert model.num_layers and model.hidden_size, "a configuration has its defaults filled in"
    stages, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    layers, dp = model.num_layers / stages, world_size // parallel.model_parallel_size
    ends = 1.0 if stages == 1 else 0.5  # embedding or head
    parameters = slices.linear(lambda step: step.parameters).of(layers, ends)
    own = planned.heaviest.training.ranks[planned.heaviest_rank]
    tokens = [microbatch.size.tokens for microbatch in own]
    in_flight = max(sum(tokens[i : i + stages]) for i in range(len(tokens))) / slices.tokens
    state = parameters * (6 + 12 / (dp if parallel.use_distributed_optimizer else 1))
    growing = slices.growing
    peak = state + growing.base * max(tokens) / slices.tokens + growing.each * layers * in_flight
    parts: dict[Part, int] = {
        "weights": int(2 * parameters),
        "gradients": int(4 * parameters),
        "optimizer": int(state - 6 * parameters),
        "activations": int(peak - state),
    }
    sections = []
    for name, plan in (("scoring", planned.heaviest.costs), ("training", planned.heaviest.training)):
        if plan is None:
            continue
        size = sum((microbatch.size for microbatch in plan.ranks[planned.heaviest_rank]), Size(0, 0, 0))
        share = size.tokens / slices.tokens
        messages = [_tensor_message(slices, name, layers, share, tp > nodes_of)] if tp > 1 else []
        if name == "training" and dp > 1:
            across = tp * dp > nodes_of
            messages.append(Collective("reduce_scatter", "data", dp, across, 1, int(4 * parameters)))
            messages.append(Collective("all_gather", "data", dp, across, 1, int(2 * parameters)))
        if stages > 1:
            hidden = 2 * model.hidden_size * size.tokens // (tp if parallel.sequence_parallel else 1)
            across = world_size // stages >= nodes_of
            times = 2 if name == "training" and stages > 2 else 1  # a stage in the middle sends gradients back as well
            messages.append(Collective("send", "pipeline", stages, across, 1, times * hidden))
        flops = _executed(planned, slices, name, size) / (stages * tp)
        sections.append(_section(name, Memory(int(peak), int(state), parts, parts, ()), flops, messages))
    return SimulatedStep(0, world_size, int(parameters), 0, slices.deep.attention, tuple(sections))


def _section(name: str, memory: Memory, flops: float, messages: list[Collective]) -> Section:
    """One in which nothing is copied."""
    nothing = Copies(0, 0, 0)
    return Section(
        name=name,
        memory=memory,
        flops=Flops(flops, 0.0, 0.0),
        collectives=tuple(messages),
        copies=nothing,
        copies_to_host=nothing,
        staged=0,
        waits=(),
        operations=0,
        seconds=0.0,
    )


def least_peak(run: RunConfig, world_size: int, slices: Slices) -> float:
    """Bytes that a stage in the middle needs with one microbatch of the slices' tokens; no plan takes less."""
    parallel = run.parallel
    assert run.model.num_layers, "a configuration has its defaults filled in"
    layers = run.model.num_layers / parallel.pipeline_model_parallel_size
    dp = world_size // parallel.model_parallel_size
    parameters = slices.linear(lambda step: step.parameters).of(layers, 0.0)
    return parameters * (6 + 12 / dp) + slices.growing.of(layers, 0.0)


def _executed(planned: Survey, slices: Slices, name: str, size: Size) -> float:
    """FLOPs over all stages and tensor-parallel ranks, as if each stage were as slow as the one with the head."""
    work = planned.work
    own = Size(slices.tokens, slices.tokens * (slices.tokens + 1) // 2, slices.tokens)
    tp = slices.deep.world_size
    counted = slices.linear(lambda step: _flops(step, name))
    layers_of = work.token * own.tokens + work.pair * own.pairs
    per_layer = counted.each * tp / (layers_of / planned.layers)
    head = counted.base * tp / (work.scored * own.scored)
    ends = planned.stages  # which all wait for the last one
    return per_layer * (work.token * size.tokens + work.pair * size.pairs) + head * work.scored * size.scored * ends


def _tensor_message(slices: Slices, name: str, layers: float, share: float, between_nodes: bool) -> Collective:
    """All tensor-parallel messages as one, of the bytes that a ring takes as long for."""
    size = slices.linear(lambda step: _ring_bytes(step, name)).of(layers) * share
    ranks = slices.deep.world_size
    return Collective("all_gather", "tensor", ranks, between_nodes, 1, int(size * ranks / (ranks - 1)))


def _growing(step: SimulatedStep) -> float:
    """Bytes at the peak of training beside weights, gradients and optimizer."""
    memory = step.section("training").memory
    return memory.peak - sum(memory.peak_parts.get(part, 0) for part in STATE)


def _flops(step: SimulatedStep, name: str) -> float:
    flops = step.section(name).flops
    return flops.model + flops.recomputed


def _ring_bytes(step: SimulatedStep, name: str) -> float:
    return sum(ring_bytes(message) for message in step.section(name).collectives if message.group == "tensor")
