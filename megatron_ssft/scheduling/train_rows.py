"""Which trace is trained in which microbatch of which rank (padded layout, equal counts)."""

from __future__ import annotations

import math
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
from megatron_ssft.scheduling.balance import balance, makespan_lower_bound
from megatron_ssft.scheduling.work import WorkModel, padded_microbatch


def plan_train_microbatches(
    batch: QuestionBatch,
    assignments: Sequence[Assignment],
    tags: ForkingTokens,
    *,
    num_ranks: int,
    micro_batch_size: int,
    group_size: int,
    work: WorkModel,
) -> MicrobatchPlan:
    """Every trace once, under its tag, with the least possible number of PAD sequences.

    All ranks get the same number K of microbatches, of exactly b sequences each, K a multiple of v. That takes
    (-S) mod (R b v) PADs for S traces, never more. Sequences are sorted by length and cut into microbatches in that
    order, PADs last: no other grouping has less padded work. `balance` then spreads the microbatches over the ranks;
    which question a trace belongs to plays no part. Each rank runs its longest microbatch first.

    Args:
        batch: Q questions with S traces in all.
        assignments: the Q tags' assignments.
        tags: the forking tokens' ids, for the lengths.
        num_ranks: R, data-parallel ranks.
        micro_batch_size: b, sequences in a microbatch.
        group_size: v, to which the virtual pipeline needs K to be a multiple; 1 without one.
        work: estimate of the work of a sequence.

    Raises:
        ValueError: the batch has no traces.
    """
    sequences = train_sequences(batch, assignments, tags)
    if not sequences:
        raise ValueError("there is nothing to train: the batch has no traces")
    num_pads = -len(sequences) % (num_ranks * micro_batch_size * group_size)
    sequences += [PAD] * num_pads
    microbatches = [
        padded_microbatch(sequences[k : k + micro_batch_size]) for k in range(0, len(sequences), micro_batch_size)
    ]
    return spread(microbatches, num_ranks, work, equal_counts=True, pad_lower_bound=num_pads)


def train_sequences(batch: QuestionBatch, assignments: Sequence[Assignment], tags: ForkingTokens) -> list[SequenceSpec]:
    """All traces of the batch, longest first."""
    assert len(assignments) == len(batch.sets)
    tag_lengths = [len(ids) for ids in tags.ids]
    sequences = []
    for question, (example, assignment) in enumerate(zip(batch.sets, assignments)):
        assert len(assignment.tags) == example.num_traces
        prompt = len(example.prompt_ids)
        for trace, (completion, tag) in enumerate(zip(example.completion_ids, assignment.tags)):
            length = prompt + tag_lengths[tag] + len(completion) - 1
            sequences.append(SequenceSpec(question, trace, tag, length, len(completion)))
    sequences.sort(key=lambda s: -s.num_tokens)  # stable: equal lengths stay in batch order
    return sequences


def spread(
    microbatches: Sequence[Microbatch],
    num_ranks: int,
    work: WorkModel,
    *,
    equal_counts: bool,
    pad_lower_bound: int,
) -> MicrobatchPlan:
    """The plan that gives the microbatches (sorted as each rank shall run them) to balanced ranks."""
    works = [work.of(microbatch.size) for microbatch in microbatches]
    placed = balance(works, num_ranks, equal_counts=equal_counts)
    makespan = max(math.fsum(works[k] for k in items) for items in placed)
    return MicrobatchPlan(
        ranks=tuple(tuple(microbatches[k] for k in items) for items in placed),
        pad_sequences=sum(s.is_pad for microbatch in microbatches for s in microbatch.sequences),
        pad_lower_bound=pad_lower_bound,
        makespan=makespan,
        makespan_lower_bound=min(makespan, makespan_lower_bound(works, num_ranks)),  # the mean may be rounded up
    )
