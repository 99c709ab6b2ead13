"""A microbatch of a planned batch as the arrays of a forward pass, in the layout that the plan names."""

from __future__ import annotations

from megatron_ssft.layouts.packed import build_stream
from megatron_ssft.layouts.padded import collate, context_parallel_share, rows_input
from megatron_ssft.records import Microbatch, ModelInput, PlannedBatch


def cut_microbatch(
    planned: PlannedBatch, microbatch: Microbatch, *, pad_to_multiple: int, context_rank: int = 0, context_size: int = 1
) -> ModelInput:
    """Cut a microbatch from the data.

    Args:
        microbatch: one of `planned.plan`.
        pad_to_multiple: the length is rounded up to a multiple of this.
        context_rank: place among the ranks that share a sequence.
        context_size: how many these are; above 1 in the padded layout only.
    """
    batch, tags, cut = planned.batch, planned.tags, planned.cut
    if planned.plan.layout != "padded":
        assert context_size == 1, "a token stream is not shared between ranks"
        return build_stream(
            batch,
            microbatch,
            tags,
            share_prompt=planned.plan.layout == "packed",
            max_completion_tokens=cut.max_completion_tokens,
            train_forking_token=cut.train_forking_token,
            loss_normalization=cut.loss_normalization,
            pad_to_multiple=pad_to_multiple,
        )
    arrays = collate(
        batch,
        microbatch,
        tags,
        max_completion_tokens=cut.max_completion_tokens,
        train_forking_token=cut.train_forking_token,
        loss_normalization=cut.loss_normalization,
        pad_to_multiple=pad_to_multiple,
    )
    if context_size > 1:
        arrays = context_parallel_share(arrays, context_rank, context_size)
    return rows_input(arrays)
