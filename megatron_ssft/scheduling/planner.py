"""The planner of a job: the plans of a step, for the layout and the budgets that the configuration asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_ssft.config import RunConfig
from megatron_ssft.records import (
    WHOLE,
    Assignment,
    ForkingTokens,
    MicrobatchPlan,
    PlannedBatch,
    QuestionBatch,
    SequenceCut,
)
from megatron_ssft.scheduling.cost_streams import plan_cost_streams
from megatron_ssft.scheduling.limits import RowLimits, StreamLayout, StreamLimits
from megatron_ssft.scheduling.rows import plan_cost_rows, plan_train_rows
from megatron_ssft.scheduling.sequences import distinct_traces
from megatron_ssft.scheduling.train_streams import plan_train_streams
from megatron_ssft.scheduling.work import WorkModel

MICROBATCHES_PER_STAGE = 4
"""The cost pass is cut into this many microbatches for every pipeline stage, so that stages seldom wait: a bubble of
(p - 1) / (4 p + p - 1), under a fifth."""
SMALLEST_STREAM = 1024
"""The cost pass is not cut into smaller streams: small matrix products are slow, and prompts are repeated."""


class Planner:
    """Plans of one job: the same on every rank, a function of the batch alone."""

    def __init__(
        self, config: RunConfig, vocab_size: int, num_ranks: int, cost_tokens_per_microbatch: int | None = None
    ) -> None:
        """
        Args:
            vocab_size: vocabulary entries in use.
            num_ranks: R, data-parallel ranks.
            cost_tokens_per_microbatch: of the cost pass; default: what a training microbatch may hold.
        """
        cost_tokens = cost_tokens_per_microbatch or config.train_tokens_per_microbatch
        self.num_ranks = num_ranks
        self.flops = WorkModel.for_model(config.model, vocab_size)
        """FLOPs of a forward pass, for accounting."""
        self.work = WorkModel.for_model(config.model, vocab_size, config.parallel.attention_efficiency)
        """What plans are balanced by."""
        training, stages = config.training, config.parallel.pipeline_model_parallel_size
        interleaved = config.virtual_pipeline_size is not None
        # The interleaved schedule takes microbatches in groups of the pipeline size, the same number on all ranks.
        group_size = stages if interleaved else 1
        self.min_microbatches = MICROBATCHES_PER_STAGE * stages if stages > 1 else 1
        self.rows: RowLimits | None = None
        """Limits in the padded layout; None: token streams."""
        if training.sequence_layout == "padded":
            self.rows = RowLimits(num_ranks, training.micro_batch_size, cost_tokens, group_size)
        self.train_streams = StreamLimits(
            num_ranks,
            config.train_tokens_per_microbatch,
            group_size,
            equal_counts=interleaved,
            layout=StreamLayout(training.share_prompt, one_question=training.sequence_layout == "concatenated"),
        )
        self.cost_streams = dataclasses.replace(self.train_streams, max_tokens=cost_tokens)

    def plan_costs(self, batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> PlannedBatch:
        """The cost pass: every pair (tag, trace) once, traces cut to their first `matching_tokens` tokens.

        In streams it has enough microbatches to keep a pipeline filled, if they do not get too small.
        """
        scored_as = tuple(distinct_traces(example, matching_tokens) for example in batch.sets)
        cut = SequenceCut(max_completion_tokens=matching_tokens)
        return PlannedBatch(batch, self._cost_plan(batch, tags, matching_tokens), tags, cut, scored_as)

    def _cost_plan(self, batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> MicrobatchPlan:
        if self.rows is not None:
            return plan_cost_rows(batch, matching_tokens, tags, self.rows, self.work)
        plan = plan_cost_streams(batch, matching_tokens, tags, self.cost_streams, self.work)
        affordable = plan.size.tokens // (self.num_ranks * SMALLEST_STREAM)
        microbatches = min(self.min_microbatches, affordable)
        if microbatches > min(map(len, plan.ranks)):
            limits = dataclasses.replace(self.cost_streams, min_microbatches=microbatches)
            plan = plan_cost_streams(batch, matching_tokens, tags, limits, self.work)
        return plan

    def plan_sequences(
        self, batch: QuestionBatch, assignments: Sequence[Assignment], tags: ForkingTokens, cut: SequenceCut = WHOLE
    ) -> PlannedBatch:
        """Every trace once, under its tag: on which rank, in which microbatch."""
        if self.rows is not None:
            plan = plan_train_rows(batch, assignments, tags, self.rows, self.work)
        else:
            plan = plan_train_streams(batch, assignments, tags, self.train_streams, self.work)
        return PlannedBatch(batch, plan, tags, cut)
