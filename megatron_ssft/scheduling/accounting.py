"""Model FLOPs of a step: those the method needs for the actual lengths, without padding and recompute.

A forward pass counts once, a backward pass twice (gradients of inputs and of weights). This is the convention of
model FLOPs utilisation (MFU): recomputation makes a step slower, not its FLOPs more.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.records import MicrobatchPlan, Size
from megatron_ssft.scheduling.work import WorkModel


def useful_size(plan: MicrobatchPlan) -> Size:
    """The plan's size without padding and PAD sequences; prompts that are shared count once."""
    sequences = plan.sequences
    if plan.layout == "padded":
        pairs = sum(s.num_tokens * (s.num_tokens + 1) // 2 for s in sequences)
        return Size(sum(s.num_tokens for s in sequences), pairs, sum(s.num_scored for s in sequences))
    pads = plan.pad_sequences
    return Size(plan.size.tokens - pads, plan.size.pairs - pads, plan.size.scored)


@dataclass(frozen=True)
class FlopAccountant:
    """FLOPs of plans, summed over all ranks."""

    work: WorkModel
    """Work of a forward pass, in FLOPs (attention efficiency 1)."""

    def forward(self, plan: MicrobatchPlan) -> float:
        """FLOPs of a cost pass."""
        return self.work.of(useful_size(plan))

    def training(self, plan: MicrobatchPlan) -> float:
        """FLOPs of a training step: forward and backward."""
        return 3 * self.forward(plan)
