"""From a planned microbatch to the arrays of a forward pass, in the padded layout: one sequence a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.records import Assignment, ForkingTokens, Microbatch, ModelInput, QuestionBatch, TokenArrays

NORMALIZATIONS = ("token", "sequence")


def collate(
    batch: QuestionBatch,
    microbatch: Microbatch,
    tags: ForkingTokens,
    *,
    max_completion_tokens: int | None,
    train_forking_token: bool,
    loss_normalization: str,
    pad_to_multiple: int,
) -> TokenArrays:
    """Rows `prompt + tag + completion`, right-padded, all [b, s].

    The target of a token is the one that follows it, so the completion's first target stands at the tag's last
    token, and the tag's first at the prompt's last. Positions count 0..s-1 in every row. PAD sequences and padding
    are token 0 with weight 0.

    Args:
        batch: the questions that the sequences refer to.
        microbatch: b sequences.
        tags: the forking tokens' ids.
        max_completion_tokens: cut every completion to its first this many tokens (T_r in the cost pass); None: whole.
        train_forking_token: weigh the tag's own tokens as targets, too.
        loss_normalization: `token`: weight 1 for every target that counts; `sequence`: 1 / the number of targets
            that count in the row, so that a row's weighted sum is its mean.
        pad_to_multiple: s is the longest row rounded up to a multiple of this.
    """
    assert loss_normalization in NORMALIZATIONS, loss_normalization
    rows = len(microbatch.sequences)
    longest = max(s.num_tokens for s in microbatch.sequences)
    width = -(-longest // pad_to_multiple) * pad_to_multiple
    stream = np.zeros((rows, width + 1), dtype=np.int64)  # inputs and, one further on, targets
    first, end = np.zeros((2, rows, 1), dtype=np.int64)  # targets first..end-1 count, inputs 0..end-1 are tokens
    for row, spec in enumerate(microbatch.sequences):
        if spec.is_pad:
            continue
        example, tag_ids = batch.sets[spec.question], tags.ids[spec.tag]
        completion = example.completion_ids[spec.trace][:max_completion_tokens]
        tag_start = len(example.prompt_ids)
        start = tag_start + len(tag_ids)
        stop = start + len(completion)
        assert stop - 1 == spec.num_tokens, "the plan and the batch, or their cut of the completion, differ"
        stream[row, :tag_start] = example.prompt_ids
        stream[row, tag_start:start] = tag_ids
        stream[row, start:stop] = completion
        first[row] = _first_target(tag_start, len(tag_ids), train_forking_token)
        end[row] = stop - 1
    column = np.arange(width)
    counts = (column >= first) & (column < end)
    weights = counts.astype(np.float32)
    if loss_normalization == "sequence":
        weights /= np.maximum(end - first, 1).astype(np.float32)
    return TokenArrays(
        tokens=np.where(column < end, stream[:, :-1], 0),
        position_ids=np.tile(column, (rows, 1)),
        targets=np.where(counts, stream[:, 1:], 0),
        weights=weights,
    )


def rows_input(arrays: TokenArrays) -> ModelInput:
    """Rows as the model takes them: scored are the places with a weight."""
    rows, columns = np.nonzero(arrays.weights)
    return ModelInput(
        tokens=arrays.tokens,
        position_ids=arrays.position_ids,
        scored=columns * len(arrays.tokens) + rows,
        targets=arrays.targets[rows, columns],
        weights=arrays.weights[rows, columns],
        owner=rows,
        segments=None,
    )


def context_parallel_share(arrays: TokenArrays, rank: int, size: int) -> TokenArrays:
    """A rank's two pieces of every row, one from each end, so that causal attention is balanced over the ranks."""

    def share(values: np.ndarray) -> np.ndarray:
        pieces = np.split(values, 2 * size, axis=1)
        return np.concatenate([pieces[rank], pieces[2 * size - 1 - rank]], axis=1)

    return TokenArrays(*(share(a) for a in (arrays.tokens, arrays.position_ids, arrays.targets, arrays.weights)))


def loss_denominator(
    batch: QuestionBatch,
    assignments: Sequence[Assignment],
    tags: ForkingTokens,
    *,
    train_forking_token: bool,
    loss_normalization: str,
) -> int:
    """What the weighted loss of the whole global batch is divided by: the same on every rank, whatever the layout.

    Targets that count (`token`) or sequences (`sequence`) over all questions of the batch.
    """
    assert loss_normalization in NORMALIZATIONS, loss_normalization
    if loss_normalization == "sequence":
        return batch.num_traces
    targets = 0
    for example, assignment in zip(batch.sets, assignments, strict=True):
        prompt = len(example.prompt_ids)
        for completion, tag in zip(example.completion_ids, assignment.tags, strict=True):
            length = len(tags.ids[tag])
            targets += prompt + length + len(completion) - 1 - _first_target(prompt, length, train_forking_token)
    return targets


def _first_target(prompt_length: int, tag_length: int, train_forking_token: bool) -> int:
    """Column of the first target that counts; without a prompt nothing predicts the first token of the tag."""
    return max(0, prompt_length - 1 + (0 if train_forking_token else tag_length))
