"""Which (tag, trace) pair is scored in which forward-only microbatch of which rank."""

from __future__ import annotations

import heapq

from megatron_ssft.records import PAD, ForkingTokens, MicrobatchPlan, QuestionBatch, SequenceSpec
from megatron_ssft.scheduling.train_rows import spread
from megatron_ssft.scheduling.work import WorkModel, padded_microbatch, padded_size


def plan_cost_microbatches(
    batch: QuestionBatch,
    tags: ForkingTokens,
    *,
    matching_tokens: int,
    num_ranks: int,
    tokens_per_microbatch: int,
    group_size: int,
    work: WorkModel,
) -> MicrobatchPlan:
    """All N x M pairs of every question, each once, the trace cut to its first T_r tokens.

    A microbatch holds at most `tokens_per_microbatch` padded tokens (count x longest), or a single longer sequence.
    The number of microbatches is the least that the budget allows, rounded up until every rank can have as many;
    within it they are made as even in work as they can be. Pairs of one question may be scored anywhere.

    PADs appear only where there are fewer pairs than microbatches needed: one-PAD microbatches for ranks that would
    have none and, with a virtual pipeline, to make every rank's count the same multiple of `group_size`.

    Args:
        batch: Q questions.
        tags: N forking tokens.
        matching_tokens: T_r, tokens of each trace that count.
        num_ranks: R, data-parallel ranks.
        tokens_per_microbatch: padded tokens in a microbatch.
        group_size: v, to which the virtual pipeline needs the counts to be a multiple; 1 without one.
        work: estimate of the work of a sequence.

    Raises:
        ValueError: the batch has no traces.
    """
    pairs = _pairs(batch, tags, matching_tokens)
    if not pairs:
        raise ValueError("there is nothing to score: the batch has no traces")
    least = len(_pack(pairs, tokens_per_microbatch, work, float("inf")))
    wanted = -(-least // (num_ranks * group_size)) * num_ranks * group_size
    if group_size == 1:  # counts may differ, so nothing needs a PAD but a rank with nothing to do
        wanted = min(wanted, max(len(pairs), num_ranks))
    bounds = _even(pairs, tokens_per_microbatch, work, wanted)
    microbatches = [padded_microbatch(pairs[start:stop]) for start, stop in bounds]
    num_pads = max(0, wanted - len(pairs))
    microbatches += [padded_microbatch([PAD])] * num_pads
    return spread(microbatches, num_ranks, work, equal_counts=group_size > 1, pad_lower_bound=num_pads)


def _pairs(batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> list[SequenceSpec]:
    """Every pair as a sequence, longest first."""
    tag_lengths = [len(ids) for ids in tags.ids]
    pairs = []
    for question, example in enumerate(batch.sets):
        for trace, completion in enumerate(example.completion_ids):
            scored = min(len(completion), matching_tokens)
            tokens = len(example.prompt_ids) + scored - 1
            pairs += [
                SequenceSpec(question, trace, tag, tokens + length, scored) for tag, length in enumerate(tag_lengths)
            ]
    pairs.sort(key=lambda s: -s.num_tokens)
    return pairs


def _pack(pairs: list[SequenceSpec], max_tokens: int, work: WorkModel, max_work: float) -> list[tuple[int, int]]:
    """Cut descending pairs into the fewest runs within both limits (a run of one may exceed them)."""
    bounds, start = [], 0
    while start < len(pairs):
        each = work.of(padded_size([pairs[start]]))
        count = min(max_tokens // pairs[start].num_tokens, int(min(max_work / each, len(pairs))))
        stop = min(start + max(1, count), len(pairs))
        bounds.append((start, stop))
        start = stop
    return bounds


def _even(pairs: list[SequenceSpec], max_tokens: int, work: WorkModel, wanted: int) -> list[tuple[int, int]]:
    """`wanted` runs (or as many as there are pairs) of descending pairs with the heaviest as light as can be."""

    def run_work(start: int, stop: int) -> float:
        return (stop - start) * work.of(padded_size([pairs[start]]))

    low, high = sum(work.of(padded_size([p])) for p in pairs) / wanted, run_work(0, len(pairs))
    while high - low > low / 1000:  # bisect the limit of a run's work; `high` never takes more than `wanted` runs
        middle = (low + high) / 2
        if len(_pack(pairs, max_tokens, work, middle)) <= wanted:
            high = middle
        else:
            low = middle
    bounds = _pack(pairs, max_tokens, work, high)
    heap = [(-run_work(*run), run) for run in bounds if run[1] - run[0] > 1]
    heapq.heapify(heap)
    runs = set(bounds)
    while len(runs) < wanted and heap:  # halve the heaviest
        start, stop = heapq.heappop(heap)[1]
        middle = (start + stop) // 2
        runs.remove((start, stop))
        for half in ((start, middle), (middle, stop)):
            runs.add(half)
            if half[1] - half[0] > 1:
                heapq.heappush(heap, (-run_work(*half), half))
    return sorted(runs)
