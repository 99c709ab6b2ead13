"""What a pipeline stage needs of its GPU's memory, and the longest sequences that would fit."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.config.gpus import Gpu
from megatron_ssft.parallel.simulated.records import Part, SimulatedStep

UNSEEN_BYTES = int(2.5 * 2**30)
"""CUDA's context, the buffers of NCCL and cuBLAS, accumulators inside of attention kernels."""
UNSEEN_SHARE = 0.05
"""Of what is counted: fragmentation of torch's allocator, with expandable segments."""
STATE: tuple[Part, ...] = ("weights", "gradients", "optimizer")
"""Parts that do not depend on the data."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the GPU of one rank of a stage, in the step that needs the most."""

    stage: int
    rank: int
    parts: dict[Part, int]
    """At the peak, by what they are for."""
    peak: int
    between_steps: int
    needed: int
    """The peak, and the allowance for what a simulation cannot see."""
    gpu: int | None
    """Bytes that the GPU has, where it is known."""

    @property
    def margin(self) -> int | None:
        """Bytes that stay free; below 0: it does not fit."""
        return None if self.gpu is None else self.gpu - self.needed

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer."""
        return sum(self.parts.get(part, 0) for part in STATE)


def stage_memory(stage: int, step: SimulatedStep, gpu: Gpu | None) -> StageMemory:
    """What a simulated rank of the stage needs."""
    highest = max((section.memory for section in step.sections), key=lambda memory: memory.peak)
    return StageMemory(
        stage=stage,
        rank=step.rank,
        parts=highest.peak_parts,
        peak=highest.peak,
        between_steps=step.between_steps,
        needed=with_allowance(highest.peak),
        gpu=None if gpu is None else gpu.bytes,
    )


def with_allowance(peak: float) -> int:
    """The peak and what a simulation cannot see."""
    return int(peak * (1 + UNSEEN_SHARE)) + UNSEEN_BYTES


def room_to_grow(memory: StageMemory) -> float:
    """Bytes at the peak that the GPU has beside the state and what is not seen."""
    assert memory.gpu is not None
    return (memory.gpu - UNSEEN_BYTES) / (1 + UNSEEN_SHARE) - memory.state
