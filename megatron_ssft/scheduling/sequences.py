"""What a step has to run: every trace under its tag (training), every pair of tag and trace (cost pass)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.records import Assignment, ForkingTokens, QuestionBatch, SequenceSpec, TokenizedSet


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


def cost_sequences(
    batch: QuestionBatch, matching_tokens: int, tags: ForkingTokens, *, distinct: bool
) -> list[SequenceSpec]:
    """Every pair of a tag and a trace of its question, traces cut to their first T_r tokens (equations 3-4).

    The pairs stand in line: question by question, tag by tag, trace by trace.

    Args:
        batch: Q questions.
        matching_tokens: T_r.
        tags: N forking tokens.
        distinct: of traces that agree in what is scored, take only the first (`distinct_traces`).
    """
    pairs = []
    for question, example in enumerate(batch.sets):
        prompt = len(example.prompt_ids)
        first_of = distinct_traces(example, matching_tokens) if distinct else range(example.num_traces)
        scored = [
            (trace, min(len(example.completion_ids[trace]), matching_tokens))
            for trace, first in enumerate(first_of)
            if trace == first
        ]
        for tag, ids in enumerate(tags.ids):
            before = prompt + len(ids) - 1
            pairs += [SequenceSpec(question, trace, tag, before + count, count) for trace, count in scored]
    return pairs


def distinct_traces(tokenized_set: TokenizedSet, matching_tokens: int) -> tuple[int, ...]:
    """For each of the M traces the first whose first T_r tokens are the same, which may be itself."""
    first: dict[bytes, int] = {}
    return tuple(
        first.setdefault(np.asarray(completion[:matching_tokens], dtype=np.int64).tobytes(), trace)
        for trace, completion in enumerate(tokenized_set.completion_ids)
    )
