"""The steps of a run of SSFT, planned: which one needs the most memory, and what an average one takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.config import RunConfig, SSFTConfig
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.matching.assignment import Matcher
from megatron_ssft.objectives.sets import build_queue, make_batch
from megatron_ssft.records import Microbatch, MicrobatchPlan, QuestionVisit
from megatron_ssft.scheduling.pipeline_time import PipelineTime, pipeline_time
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.scheduling.work import WorkModel
from megatron_ssft.tokenizers.vocabulary import Vocabulary

SAMPLED = 24
"""Steps, evenly spaced over an epoch, that stand for all."""
SUSPECTED = 8
"""Steps with the longest sequences that are looked at for the heaviest, and as many of the most tokens."""


@dataclass(frozen=True)
class Epoch:
    """The first pass over the data, cut into steps."""

    visits: tuple[tuple[QuestionVisit, ...], ...]
    """The questions of each step."""
    longest: np.ndarray
    """int64 [steps]: tokens of the longest sequence, its tag left out."""
    tokens: np.ndarray
    """int64 [steps]: of all sequences, each with its prompt."""
    steps: int
    """Of the whole run."""

    def sampled(self, at_most: int) -> list[int]:
        """Numbers of steps that stand for all."""
        count = len(self.visits)
        return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()

    def suspected(self, each: int) -> list[int]:
        """Numbers of the steps one of which needs the most memory: by longest sequence, and by all tokens."""
        most = (np.argsort(-figures, kind="stable")[:each].tolist() for figures in (self.longest, self.tokens))
        return sorted({number for numbers in most for number in numbers})


@dataclass(frozen=True)
class PlannedStep:
    """A step's microbatches."""

    number: int
    """0-based, in the run."""
    costs: MicrobatchPlan | None
    """The cost pass; None where traces are not matched by costs."""
    training: MicrobatchPlan


@dataclass(frozen=True)
class Survey:
    """Steps of a layout."""

    sampled: tuple[PlannedStep, ...]
    heaviest: PlannedStep
    """The step that needs the most memory."""
    heaviest_rank: int
    """The data-parallel rank on which it does."""
    work: WorkModel
    """FLOPs of a forward pass."""
    layers: int
    """Of the model."""
    stages: int
    chunks: int

    def forward(self, microbatches: Sequence[Microbatch]) -> list[float]:
        """FLOPs of each one's forward pass through all stages."""
        return [self.work.of(microbatch.size) for microbatch in microbatches]

    def slowest(self, plan: MicrobatchPlan, backward_ratio: float) -> PipelineTime:
        """Of all data-parallel ranks. The time is in FLOPs of one stage, those included for which it waits."""
        works = map(self.forward, plan.ranks)
        return max(pipeline_time(each, self.stages, self.chunks, backward_ratio) for each in works)


def cut_epoch(config: SSFTConfig, dataset: SetDataset) -> Epoch:
    """The first epoch's steps."""
    queue = build_queue(config, dataset)
    longest_of, tokens_of = dataset.sequence_tokens()
    visits: list[tuple[QuestionVisit, ...]] = []
    traces, all_traces = 0, int(dataset.trace_counts.sum())
    while traces < all_traces and (step := queue.next_batch()) is not None:
        visits.append(step)
        traces += sum(int(dataset.trace_counts[visit.index]) for visit in step)
    places = [[visit.index for visit in step] for step in visits]
    return Epoch(
        visits=tuple(visits),
        longest=np.array([longest_of[step].max() for step in places], dtype=np.int64),
        tokens=np.array([tokens_of[step].sum() for step in places], dtype=np.int64),
        steps=config.run.training.train_iters or (config.batches.train_epochs or 0) * len(visits),
    )


def survey(
    config: SSFTConfig, dataset: SetDataset, vocabulary: Vocabulary, epoch: Epoch, dp_size: int, share: int = 1
) -> Survey:
    """Plans of the steps that stand for all, and of those that may be the heaviest. Tags are drawn at random.

    Args:
        dp_size: data-parallel ranks.
        share: plan one in so many of the former only.
    """
    sampled, suspected = epoch.sampled(-(-SAMPLED // share)), epoch.suspected(SUSPECTED)
    planner = Planner(config.run, vocabulary.size, dp_size, config.cost_tokens_per_microbatch)
    mode = "single" if config.matching.matching == "single" else "random"
    matcher = Matcher(mode, vocabulary.tags.num_tags, config.run.training.seed)

    def planned(number: int) -> PlannedStep:
        batch = make_batch(dataset, epoch.visits[number])
        costs = None
        if config.matching.matching == "optimal":
            costs = planner.plan_costs(batch, vocabulary.tags, config.matching.matching_tokens).plan
        assignments = matcher.assign(batch, [None] * len(batch.sets))
        return PlannedStep(number, costs, planner.plan_sequences(batch, assignments, vocabulary.tags).plan)

    steps = {number: planned(number) for number in sorted({*sampled, *suspected})}
    weights = {
        (number, rank): held(config.run, microbatches)
        for number, step in steps.items()
        for rank, microbatches in enumerate(step.training.ranks)
    }
    number, rank = max(weights, key=lambda key: weights[key])
    assert config.run.model.num_layers, "a configuration has its defaults filled in"
    return Survey(
        sampled=tuple(steps[number] for number in sampled),
        heaviest=steps[number],
        heaviest_rank=rank,
        work=planner.flops,
        layers=config.run.model.num_layers,
        stages=config.run.parallel.pipeline_model_parallel_size,
        chunks=config.run.virtual_pipeline_size or 1,
    )


def held(run: RunConfig, microbatches: Sequence[Microbatch]) -> float:
    """Bytes that the first stage keeps of these at most, over its tensor-parallel ranks, to compare ranks and steps by.

    A layer keeps its input where it is recomputed, else all that its backward pass reads (arXiv 2205.05198, section
    4). Of as many microbatches in a row as there are stages, the first stage keeps that at once; of one of them a
    recomputed layer is there in whole.
    """
    model, stages = run.model, run.parallel.pipeline_model_parallel_size
    assert model.num_layers and model.hidden_size, "a configuration has its defaults filled in"
    whole = layer_bytes_per_token(run)
    is_full = run.parallel.recompute_granularity == "full"
    kept = model.num_layers // stages * (2.0 * model.hidden_size if is_full else whole)
    tokens = [microbatch.size.tokens for microbatch in microbatches]
    in_flight = max(sum(tokens[i : i + stages]) for i in range(len(tokens)))
    return kept * in_flight + (whole * max(tokens) if is_full else 0.0)


def layer_bytes_per_token(run: RunConfig) -> float:
    """Bytes that a layer keeps of a token in bfloat16, over all tensor-parallel ranks, with fused kernels."""
    model = run.model
    assert model.hidden_size and model.ffn_hidden_size, "a configuration has its defaults filled in"
    return 18.0 * model.hidden_size + (6.0 if model.swiglu else 4.0) * model.ffn_hidden_size
