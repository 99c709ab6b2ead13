"""Seconds of an average step by a stated model: counted FLOPs and bytes, divided by what the hardware is taken to do.

- Kernels attain a share of the GPU's peak FLOP/s (--attainable-share), the same everywhere.
- Messages move at LINK_SHARE of the links' speed, in rings: an all-gather or reduce-scatter of b bytes over n ranks
  takes b (n - 1) / n over it, an all-reduce twice that. Tensor-parallel ones and those between stages hide behind
  nothing.
- Gradients are reduced behind the backward pass of the last microbatch, and weights gathered behind the forward pass of
  the first one, where --overlap-grad-reduce and --overlap-param-gather are on.
- Stages wait as in `scheduling.pipeline_time`; in a step all wait for the slowest data-parallel rank.
- AdamW reads and writes its state once, at the speed of the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_ssft.booking.survey import Survey
from megatron_ssft.config import RunConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.parallel.device_defaults import decided
from megatron_ssft.parallel.simulated.records import Collective, Section, SimulatedStep
from megatron_ssft.records import MicrobatchPlan

LINK_SHARE = 0.8
_OPTIMIZER_BYTES = 34
"""Per parameter: gradient, float32 weight and averages read, the latter three written, and the weight in bfloat16."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an average step by part, as the slowest rank spends them; they add up."""

    matching: float
    """Forward passes that score traces under tags."""
    training: float
    """Forward and backward passes."""
    waiting: float
    """Of pipeline stages for each other."""
    tensor: float
    """Messages between tensor-parallel ranks."""
    pipeline: float
    """Messages between stages."""
    data: float
    """Gradients and weights between data-parallel ranks, as far as nothing hides them."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class AverageStep:
    """What an average step takes, before any hardware is looked at."""

    matching_flops: float
    """Of one GPU of the slowest stage and data-parallel rank, repeated forward passes included."""
    training_flops: float
    waiting_flops: float
    """What a GPU could do while it waits for other stages."""
    matching_idle: float
    training_idle: float
    """Share of the passes in which stages wait."""
    matching_ratio: float
    training_ratio: float
    """Tokens of the slowest rank over those of the simulated step's; its messages are scaled by it."""
    last_microbatch: float
    """Share of the training FLOPs that the last microbatch's backward pass is."""
    model_flops: float
    """That the method needs, over all GPUs, without matching (for MFU)."""
    method_flops: float
    """The same with it."""
    tokens: float | None
    """Trained, over all GPUs, prompts that are shared once; None in policy learning."""


def average_step(survey: Survey, steps: Sequence[SimulatedStep], run: RunConfig) -> AverageStep:
    """The mean over the sampled steps; the simulated one tells how much a GPU does for a FLOP of the plan.

    Args:
        steps: the heaviest step, of several stages.
    """
    shared = run.parallel.tensor_model_parallel_size * run.parallel.context_parallel_size
    rank, heaviest = survey.heaviest_rank, survey.heaviest
    training = _per_planned(steps, "training", survey, heaviest.training, rank, shared)
    scoring = 0.0
    if heaviest.costs is not None:
        scoring = _per_planned(steps, "scoring", survey, heaviest.costs, rank, shared)
    trained = [survey.slowest(step.training, training - 1) for step in survey.sampled]
    scored = [survey.slowest(step.costs, 0.0) for step in survey.sampled if step.costs is not None]
    busy_t = [each.time * (1 - each.idle_share) / shared for each in trained]
    busy_s = [each.time * (1 - each.idle_share) / shared * scoring for each in scored] or [0.0]
    waits = [0.0]
    if survey.stages > 1:
        waits = [each.time * each.idle_share / shared for each in trained]
        waits += [each.time * each.idle_share / shared * scoring for each in scored]
    own = heaviest.training.ranks[rank]
    plans = [step.training for step in survey.sampled]
    forward = fmean(survey.work.of(plan.size) for plan in plans)
    costs = [survey.work.of(step.costs.size) for step in survey.sampled if step.costs is not None]
    last = [min(survey.forward(of_rank)) / sum(survey.forward(of_rank)) for plan in plans for of_rank in plan.ranks]
    return AverageStep(
        matching_flops=fmean(busy_s),
        training_flops=fmean(busy_t),
        waiting_flops=sum(waits) / len(survey.sampled),
        matching_idle=fmean(each.idle_share for each in scored) if scored else 0.0,
        training_idle=fmean(each.idle_share for each in trained),
        matching_ratio=_tokens_ratio([s.costs for s in survey.sampled], heaviest.costs, rank),
        training_ratio=_tokens_ratio(plans, heaviest.training, rank),
        last_microbatch=fmean(last) * (1 - 1 / training) if own else 0.0,
        model_flops=3 * forward,
        method_flops=3 * forward + (fmean(costs) if costs else 0.0),
        tokens=fmean(plan.size.tokens for plan in plans),
    )


def _per_planned(
    steps: Sequence[SimulatedStep], name: str, survey: Survey, plan: MicrobatchPlan, rank: int, shared: int
) -> float:
    """FLOPs of the busiest simulated stage for a FLOP of the plan's forward pass that falls to a stage."""
    planned = sum(survey.forward(plan.ranks[rank])) / (shared * survey.stages)
    return max(_executed(section) for section in _sections(steps, name)) / planned


def _executed(section: Section) -> float:
    return section.flops.model + section.flops.recomputed


def _sections(steps: Iterable[SimulatedStep], name: str) -> list[Section]:
    return [section for step in steps for section in step.sections if section.name == name]


def _tokens_ratio(plans: Sequence[MicrobatchPlan | None], simulated: MicrobatchPlan | None, rank: int) -> float:
    """Mean tokens of the rank with the most over those of the simulated one."""
    if simulated is None:
        return 0.0
    own = sum(microbatch.size.tokens for microbatch in simulated.ranks[rank])
    most = [max(sum(mb.size.tokens for mb in of_rank) for of_rank in plan.ranks) for plan in plans if plan is not None]
    return fmean(most) / own


def with_gathered_weights(step: SimulatedStep) -> SimulatedStep:
    """The step with the messages that bring the new weights to all ranks, if they come in the next one only.

    They are bfloat16, where the reduced gradients are float32.
    """
    training = step.section("training")
    kinds = {message.kind for section in step.sections for message in section.collectives if message.group == "data"}
    if "reduce_scatter" not in kinds or "all_gather" in kinds:
        return step
    later = tuple(
        dataclasses.replace(message, kind="all_gather", bytes=message.bytes // 2)
        for message in training.collectives
        if (message.group, message.kind) == ("data", "reduce_scatter")
    )
    complete = dataclasses.replace(training, collectives=(*training.collectives, *later))
    sections = tuple(complete if section is training else section for section in step.sections)
    return dataclasses.replace(step, sections=sections)


def step_time(
    average: AverageStep, steps: Sequence[SimulatedStep], run: RunConfig, asked: DryRun, times: float = 1.0
) -> StepTime:
    """Seconds of an average step on the hardware that --dry-run is asked about.

    `times`: attain so many times --attainable-share.
    """
    hardware = asked.hardware
    assert hardware is not None
    speed = hardware.tflops * 1e12 * asked.attainable_share * times
    link, network = hardware.link * 1e9 * LINK_SHARE, asked.network * LINK_SHARE

    def seconds(name: str, groups: tuple[str, ...], kinds: tuple[str, ...] = ()) -> float:
        """Of the stage that takes the longest."""
        return max(
            (
                sum(
                    ring_bytes(message) / (network if message.between_nodes else link)
                    for message in section.collectives
                    if message.group in groups and (not kinds or message.kind in kinds)
                )
                for section in _sections(steps, name)
            ),
            default=0.0,
        )

    of_tokens = (("scoring", average.matching_ratio, average.matching_idle),) + (
        ("training", average.training_ratio, average.training_idle),
    )
    tensor = sum(seconds(n, ("tensor", "context")) * ratio / (1 - idle) for n, ratio, idle in of_tokens)
    pipeline = sum(seconds(n, ("pipeline",), ("send",)) * ratio / (1 - idle) for n, ratio, idle in of_tokens)
    reduced = seconds("training", ("data",), ("reduce_scatter", "all_reduce"))
    gathered = seconds("training", ("data",), ("all_gather",))
    parallel = decided(run, on_gpu=True).parallel
    behind = average.training_flops * average.last_microbatch / speed
    if parallel.overlap_grad_reduce:
        reduced = max(0.0, reduced - behind)
    if parallel.overlap_param_gather:
        gathered = max(0.0, gathered - behind / 2)  # a forward pass takes half as long
    dp = steps[0].world_size // run.parallel.model_parallel_size
    share = dp if run.parallel.use_distributed_optimizer else 1
    return StepTime(
        matching=average.matching_flops / speed,
        training=average.training_flops / speed,
        waiting=average.waiting_flops / speed,
        tensor=tensor,
        pipeline=pipeline,
        data=reduced + gathered,
        optimizer=max(step.parameters for step in steps)
        / share
        * _OPTIMIZER_BYTES
        / (hardware.memory_bandwidth * 1e12),
    )


def ring_bytes(message: Collective) -> float:
    """Bytes that each rank sends, in a ring."""
    share = (message.ranks - 1) / message.ranks
    factors = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share}
    return message.bytes * factors.get(message.kind, 1.0)
