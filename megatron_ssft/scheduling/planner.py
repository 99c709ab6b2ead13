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
from megatron_ssft.scheduling.assembly import pipeline_idle_share
from megatron_ssft.scheduling.cost_streams import plan_cost_streams
from megatron_ssft.scheduling.limits import RowLimits, StreamLayout, StreamLimits
from megatron_ssft.scheduling.pipeline_time import Pipeline
from megatron_ssft.scheduling.rows import plan_cost_rows, plan_train_rows
from megatron_ssft.scheduling.sequences import distinct_traces
from megatron_ssft.scheduling.train_streams import plan_train_streams
from megatron_ssft.scheduling.work import WorkModel


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
        self.pipeline = Pipeline(stages, config.virtual_pipeline_size or 1, _backward_ratio(config))
        """What a rank's training microbatches go through."""
        forward = dataclasses.replace(self.pipeline, backward_ratio=0.0)
        self.train_rows: RowLimits | None = None
        """Limits in the padded layout; None: token streams."""
        self.cost_rows: RowLimits | None = None
        if training.sequence_layout == "padded":
            self.train_rows = RowLimits(num_ranks, training.micro_batch_size, cost_tokens, group_size, self.pipeline)
            self.cost_rows = dataclasses.replace(self.train_rows, pipeline=forward)
        self.train_streams = StreamLimits(
            num_ranks,
            config.train_tokens_per_microbatch,
            group_size,
            equal_counts=interleaved,
            pipeline=self.pipeline,
            layout=StreamLayout(training.share_prompt, one_question=training.sequence_layout == "concatenated"),
        )
        self.cost_streams = dataclasses.replace(self.train_streams, max_tokens=cost_tokens, pipeline=forward)

    def plan_costs(self, batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> PlannedBatch:
        """The cost pass: every pair (tag, trace) once, traces cut to their first `matching_tokens` tokens."""
        if self.cost_rows is not None:
            plan = plan_cost_rows(batch, matching_tokens, tags, self.cost_rows, self.work)
        else:
            plan = plan_cost_streams(batch, matching_tokens, tags, self.cost_streams, self.work)
        scored_as = tuple(distinct_traces(example, matching_tokens) for example in batch.sets)
        return PlannedBatch(batch, plan, tags, SequenceCut(max_completion_tokens=matching_tokens), scored_as)

    def plan_sequences(
        self, batch: QuestionBatch, assignments: Sequence[Assignment], tags: ForkingTokens, cut: SequenceCut = WHOLE
    ) -> PlannedBatch:
        """Every trace once, under its tag: on which rank, in which microbatch."""
        if self.train_rows is not None:
            plan = plan_train_rows(batch, assignments, tags, self.train_rows, self.work)
        else:
            plan = plan_train_streams(batch, assignments, tags, self.train_streams, self.work)
        return PlannedBatch(batch, plan, tags, cut)

    def idle_share(self, plans: Sequence[MicrobatchPlan]) -> float:
        """`MicrobatchPlan.idle_share` of plans that are trained in one pass, one after the other."""
        return pipeline_idle_share([plan.ranks for plan in plans], self.work, self.pipeline)


def _backward_ratio(config: RunConfig) -> float:
    """Work of the backward over that of the forward pass: 2, and 1 more for the share of the layers recomputed.

    Selective recompute repeats core attention alone, which is not counted.
    """
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return 2.0
    if parallel.recompute_method == "uniform":
        return 3.0
    assert config.model.num_layers, "a configuration has its defaults filled in"
    chunks = parallel.pipeline_model_parallel_size * (config.virtual_pipeline_size or 1)
    return 2.0 + min(1.0, parallel.recompute_num_layers * chunks / config.model.num_layers)
