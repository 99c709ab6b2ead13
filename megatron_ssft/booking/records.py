"""What is found out about a job. Plain records, which `dataclasses.asdict` and `json` can spell."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.booking.memory import StageMemory
from megatron_ssft.booking.step_time import AverageStep, StepTime


@dataclass(frozen=True)
class Layout:
    """How a job is arranged."""

    world_size: int
    tensor: int
    pipeline: int
    virtual: int
    """Model chunks of a stage."""
    context: int
    data: int


@dataclass(frozen=True)
class Messages:
    """Bytes that one GPU sends and receives in the heaviest step, of the busiest stage."""

    inside_nodes: int
    between_nodes: int


@dataclass(frozen=True)
class WholeRun:
    """All steps."""

    steps: int
    hours: float
    hours_least: float
    """Where kernels attain a fifth more than --attainable-share."""
    hours_most: float
    """Where they attain a fifth less."""
    gpu_hours: float
    tokens_per_second: float | None
    """Trained, over all GPUs; None in policy learning."""
    mfu: float
    """FLOPs that training needs, over what the GPUs could do at their peak in the same time."""


@dataclass(frozen=True)
class Booking:
    """What a job of this layout takes."""

    layout: Layout
    gpu: str | None
    attainable_share: float
    heaviest_step: int
    """0-based number of the step whose memory is told."""
    longest_microbatch: int | None
    """Its tokens; None in policy learning."""
    memory: tuple[StageMemory, ...]
    """Of the stages that are simulated."""
    longest_that_fits: int | None
    """Tokens of a microbatch with which the fullest stage is full."""
    average: AverageStep
    messages: Messages
    time: StepTime | None
    """None: the GPU is not known, or how long pipeline stages wait."""
    run: WholeRun | None
    checkpoint_bytes: int
    """Of one, weights and optimizer."""
    simulated_seconds: float
    """What the simulations took here, one after the other."""
    traps: tuple[str, ...]
    """Known mistakes, a sentence each."""

    @property
    def fits(self) -> bool:
        """Whether every stage does, the allowance included."""
        return all(memory.margin is None or memory.margin >= 0 for memory in self.memory)

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.memory, key=lambda memory: memory.needed)
