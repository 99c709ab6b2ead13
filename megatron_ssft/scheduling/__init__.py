"""Plans: which sequence runs in which microbatch on which data-parallel rank. Plain data, no execution."""

from megatron_ssft.layouts.padded import collate, loss_denominator
from megatron_ssft.scheduling.cost_rows import plan_cost_microbatches
from megatron_ssft.scheduling.train_rows import plan_train_microbatches
from megatron_ssft.scheduling.work import WorkModel

__all__ = [
    "WorkModel",
    "collate",
    "loss_denominator",
    "plan_cost_microbatches",
    "plan_train_microbatches",
]
