"""The plans of a step, for the layout the configuration asks for."""

from __future__ import annotations

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
from megatron_ssft.scheduling.cost_rows import plan_cost_microbatches
from megatron_ssft.scheduling.cost_streams import distinct_traces, plan_cost_streams
from megatron_ssft.scheduling.train_rows import plan_train_microbatches
from megatron_ssft.scheduling.train_streams import plan_train_streams
from megatron_ssft.scheduling.work import WorkModel

MICROBATCHES_A_STAGE = 4
"""The cost pass is cut into this many microbatches for every pipeline stage, so that stages seldom wait: a bubble of
(p - 1) / (4 p + p - 1), under a fifth."""
SMALLEST_STREAM = 1024
"""But not into streams with fewer tokens than this: small matrix products are slow, and prompts are repeated."""


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
        self.config = config
        self.num_ranks = num_ranks
        self.cost_tokens = cost_tokens_per_microbatch or config.train_tokens_per_microbatch
        self.flops = WorkModel.for_model(config.model, vocab_size)
        """FLOPs of a forward pass, for accounting."""
        self.work = WorkModel.for_model(config.model, vocab_size, config.parallel.attention_efficiency)
        """What plans are balanced by."""
        stages = config.parallel.pipeline_model_parallel_size
        self.interleaved = config.virtual_pipeline_size is not None
        self.group_size = stages if self.interleaved else 1
        """The interleaved schedule takes microbatches in groups of the pipeline size, the same number on all ranks."""
        self.min_microbatches = MICROBATCHES_A_STAGE * stages if stages > 1 else 1

    # -- cost pass -----------------------------------------------------------------------------------------------

    def plan_costs(self, batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> PlannedBatch:
        """Every pair (tag, trace) once, traces cut to their first `matching_tokens` tokens."""
        scored_as = tuple(distinct_traces(example, matching_tokens) for example in batch.sets)
        cut = SequenceCut(max_completion_tokens=matching_tokens)
        return PlannedBatch(batch, self._cost_plan(batch, tags, matching_tokens), tags, cut, scored_as)

    def _cost_plan(self, batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> MicrobatchPlan:
        if self.config.training.sequence_layout == "padded":
            return plan_cost_microbatches(
                batch,
                tags,
                matching_tokens=matching_tokens,
                num_ranks=self.num_ranks,
                tokens_per_microbatch=self.cost_tokens,
                group_size=self.group_size,
                work=self.work,
            )
        plan = self._cost_streams(batch, tags, matching_tokens, min_microbatches=1)
        affordable = plan.size.tokens // (self.num_ranks * SMALLEST_STREAM)
        least = min(self.min_microbatches, affordable)
        if least > min(map(len, plan.ranks)):
            plan = self._cost_streams(batch, tags, matching_tokens, least)
        return plan

    def _cost_streams(
        self, batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int, min_microbatches: int
    ) -> MicrobatchPlan:
        return plan_cost_streams(
            batch,
            tags,
            matching_tokens=matching_tokens,
            num_ranks=self.num_ranks,
            max_tokens=self.cost_tokens,
            group_size=self.group_size,
            min_microbatches=min_microbatches,
            work=self.work,
            share_prompt=self.config.training.share_prompt,
            one_question=self.config.training.sequence_layout == "concatenated",
        )

    # -- training ------------------------------------------------------------------------------------------------

    def plan_sequences(
        self,
        batch: QuestionBatch,
        assignments: Sequence[Assignment],
        tags: ForkingTokens,
        cut: SequenceCut = WHOLE,
    ) -> PlannedBatch:
        """Every trace once, under its tag: on which rank, in which microbatch."""
        return PlannedBatch(batch, self._sequence_plan(batch, assignments, tags), tags, cut)

    def _sequence_plan(
        self, batch: QuestionBatch, assignments: Sequence[Assignment], tags: ForkingTokens
    ) -> MicrobatchPlan:
        if self.config.training.sequence_layout == "padded":
            return plan_train_microbatches(
                batch,
                assignments,
                tags,
                num_ranks=self.num_ranks,
                micro_batch_size=self.config.training.micro_batch_size,
                group_size=self.group_size,
                work=self.work,
            )
        return plan_train_streams(
            batch,
            assignments,
            tags,
            num_ranks=self.num_ranks,
            max_tokens=self.config.train_tokens_per_microbatch,
            group_size=self.group_size,
            equal_counts=self.interleaved,
            work=self.work,
            share_prompt=self.config.training.share_prompt,
            one_question=self.config.training.sequence_layout == "concatenated",
        )
