"""Planners of the padded layout, in which every sequence is a row filled up to the longest of its microbatch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ssft.records import (
    PAD,
    Assignment,
    ForkingTokens,
    Microbatch,
    MicrobatchPlan,
    QuestionBatch,
    SequenceSpec,
)
from megatron_ssft.scheduling.assembly import assemble_plan
from megatron_ssft.scheduling.balance import balance, makespan_lower_bound, split_heaviest
from megatron_ssft.scheduling.limits import RowLimits
from megatron_ssft.scheduling.pad_bound import fewest_row_microbatches, pad_lower_bound
from megatron_ssft.scheduling.sequences import cost_sequences, train_sequences
from megatron_ssft.scheduling.work import WorkModel, padded_microbatch, padded_size

Run = tuple[int, int]
"""(start, stop) in the descending order of sequences: a microbatch."""


def plan_train_rows(
    batch: QuestionBatch, assignments: Sequence[Assignment], tags: ForkingTokens, limits: RowLimits, work: WorkModel
) -> MicrobatchPlan:
    """Every trace once, under its tag, with the least possible number of PAD sequences.

    All ranks get the same number K of microbatches, of exactly b sequences each, K a multiple of v. Sequences are
    sorted by length and cut into microbatches in that order, PADs last: no other grouping has less padded work.
    `balance` then spreads the microbatches over the ranks; which question a trace belongs to plays no part. Each rank
    runs its longest microbatch first, or they stand in the order that suits its pipeline.

    Raises:
        ValueError: the batch has no traces.
    """
    sequences = train_sequences(batch, assignments, tags)
    if not sequences:
        raise ValueError("there is nothing to train: the batch has no traces")
    size, count = limits.micro_batch_size, len(sequences)
    least_pads = pad_lower_bound(
        count,
        -(-count // size),
        limits.num_ranks,
        equal_counts=True,
        group_size=limits.group_size,
        sequences_each=size,
    )
    sequences += [PAD] * (-count % (limits.num_ranks * size * limits.group_size))
    microbatches = [padded_microbatch(sequences[k : k + size]) for k in range(0, len(sequences), size)]
    return _spread(microbatches, limits, work, equal_counts=True, least_pads=least_pads)


def plan_cost_rows(
    batch: QuestionBatch, matching_tokens: int, tags: ForkingTokens, limits: RowLimits, work: WorkModel
) -> MicrobatchPlan:
    """All N x M pairs of every question, each once, the trace cut to its first T_r tokens.

    A microbatch holds at most `max_tokens` padded tokens (count x longest), or a single longer sequence. The number of
    microbatches is the least that the budget allows, rounded up until every rank can have as many; within it they are
    made as even in work as they can be. Pairs of one question may be scored anywhere.

    PADs appear only where there are fewer pairs than microbatches needed: one-PAD microbatches for ranks that would
    have none and, with a virtual pipeline, to make every rank's count the same multiple of `group_size`.

    Raises:
        ValueError: the batch has no traces.
    """
    pairs = cost_sequences(batch, matching_tokens, tags, distinct=False)
    if not pairs:
        raise ValueError("there is nothing to score: the batch has no traces")
    pairs.sort(key=lambda s: (-s.num_tokens, s.question, s.trace, s.tag))
    equal = limits.group_size > 1
    fewest = fewest_row_microbatches([pair.num_tokens for pair in pairs], limits.max_tokens)
    step = limits.num_ranks * limits.group_size
    count = -(-fewest // step) * step
    if not equal:  # counts may differ, so nothing needs a PAD but a rank with nothing to do
        count = min(count, max(len(pairs), limits.num_ranks))
    runs = _even(pairs, limits.max_tokens, work, count)
    microbatches = [padded_microbatch(pairs[start:stop]) for start, stop in runs]
    microbatches += [padded_microbatch([PAD])] * max(0, count - len(pairs))
    least_pads = pad_lower_bound(len(pairs), fewest, limits.num_ranks, equal_counts=equal, group_size=limits.group_size)
    return _spread(microbatches, limits, work, equal_counts=equal, least_pads=least_pads)


def _spread(
    microbatches: Sequence[Microbatch], limits: RowLimits, work: WorkModel, *, equal_counts: bool, least_pads: int
) -> MicrobatchPlan:
    """The plan that gives the microbatches (sorted as each rank shall run them) to balanced ranks."""
    works = [work.of(microbatch.size) for microbatch in microbatches]
    placed = balance(works, limits.num_ranks, equal_counts=equal_counts)
    return assemble_plan(
        [[microbatches[k] for k in items] for items in placed],
        work,
        layout="padded",
        pad_lower_bound=least_pads,
        makespan_lower_bound=makespan_lower_bound(works, limits.num_ranks),
        pipeline=limits.pipeline,
    )


def _pack(pairs: list[SequenceSpec], max_tokens: int, work: WorkModel, max_work: float) -> list[Run]:
    """Cut descending pairs into the fewest runs within both limits (a run of one may exceed them)."""
    runs, start = [], 0
    while start < len(pairs):
        each = work.of(padded_size([pairs[start]]))
        count = min(max_tokens // pairs[start].num_tokens, int(min(max_work / each, len(pairs))))
        stop = min(start + max(1, count), len(pairs))
        runs.append((start, stop))
        start = stop
    return runs


def _even(pairs: list[SequenceSpec], max_tokens: int, work: WorkModel, count: int) -> list[Run]:
    """`count` runs (or as many as there are pairs) of descending pairs with the heaviest as light as can be."""

    def run_work(start: int, stop: int) -> float:
        return (stop - start) * work.of(padded_size([pairs[start]]))

    low, high = sum(work.of(padded_size([p])) for p in pairs) / count, run_work(0, len(pairs))
    while high - low > low / 1000:  # bisect the limit of a run's work; `high` never takes more than `count` runs
        middle = (low + high) / 2
        if len(_pack(pairs, max_tokens, work, middle)) <= count:
            high = middle
        else:
            low = middle
    runs = _pack(pairs, max_tokens, work, high)
    split_heaviest(runs, count, key=lambda run: (-run_work(*run), *run), halve=_halves)
    return sorted(runs)


def _halves(run: Run) -> tuple[Run, Run] | None:
    start, stop = run
    middle = (start + stop) // 2
    return ((start, middle), (middle, stop)) if middle > start else None
