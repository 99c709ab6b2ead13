"""Which (tag, trace) pair is scored in which forward-only stream of which rank: the packed layout's cost pass."""

from __future__ import annotations

import heapq
from bisect import bisect_left

import numpy as np

from megatron_ssft.layouts.packed import stream_microbatch
from megatron_ssft.records import PAD, ForkingTokens, MicrobatchPlan, QuestionBatch, SequenceSpec, TokenizedSet
from megatron_ssft.scheduling.balance import balance
from megatron_ssft.scheduling.shared_nodes import StreamNodes, stream_nodes
from megatron_ssft.scheduling.train_streams import finished_plan
from megatron_ssft.scheduling.work import WorkModel

_PRECISION = 1000
"""The greatest work of a stream is found within 1/_PRECISION."""


def plan_cost_streams(
    batch: QuestionBatch,
    tags: ForkingTokens,
    *,
    matching_tokens: int,
    num_ranks: int,
    max_tokens: int,
    group_size: int,
    min_microbatches: int,
    work: WorkModel,
    share_prompt: bool = True,
    one_question: bool = False,
) -> MicrobatchPlan:
    """All pairs of a tag and a trace of its question once, each trace cut to its first T_r tokens.

    Traces of a question that agree in their first T_r tokens are scored once: the first of them appears
    (`distinct_traces`). The pairs stand in a line, question by question, tag by tag, trace by trace, which is cut
    into streams of at most `max_tokens` tokens or of one longer pair; so a cut repeats at most one prompt and one
    tag. There are as few streams as the budget allows, but as many on every rank, and at least `min_microbatches`
    there if there are pairs enough; within that they are as even in work as can be, and then spread over the ranks.

    PADs, each a stream, appear only where pairs run out: on ranks that would have nothing to do and, with
    `group_size` > 1, to make every rank's count the same multiple of it. No way to cut the line needs fewer.

    Args:
        batch: Q questions.
        tags: N forking tokens.
        matching_tokens: T_r, tokens of each trace that count.
        num_ranks: R, data-parallel ranks.
        max_tokens: tokens in a stream.
        group_size: v, to which the virtual pipeline needs the counts to be a multiple; 1 without one.
        min_microbatches: streams wanted on each rank, to keep a pipeline filled.
        work: estimate of the work of a stream.
        share_prompt: pairs of a question share its prompt, those of a tag the tag (layout `packed`); else `unshared`.
        one_question: a stream holds pairs of one question only.

    Returns:
        The plan; its `makespan_lower_bound` is max(work with every prompt and tag once / R, heaviest pair).

    Raises:
        ValueError: the batch has no traces.
    """
    pairs = _pairs(batch, tags, matching_tokens)
    if not pairs:
        raise ValueError("there is nothing to score: the batch has no traces")
    nodes = stream_nodes(batch, pairs, tags, work, share_prompt)
    line = _Line(nodes, max_tokens, one_question)
    step = num_ranks * group_size
    least = -(-len(line.cut()) // step) * step
    wanted = max(least, -(-min_microbatches // group_size) * step)
    if wanted > len(pairs):
        wanted = max(least, len(pairs) // step * step)
    if group_size == 1 and wanted > len(pairs):  # counts may differ, so only a rank with nothing to do needs a PAD
        wanted = max(len(pairs), num_ranks)
    runs = line.even(min(wanted, len(pairs)))
    pads = wanted - len(runs)
    streams = [stream_microbatch(batch, pairs[start:stop], tags, share_prompt) for start, stop in runs]
    streams += [stream_microbatch(batch, [PAD], tags, share_prompt)] * pads
    works = [line.work(*run) for run in runs] + [1] * pads
    placed = balance([max(1, units) for units in works], num_ranks, equal_counts=wanted % num_ranks == 0)
    return finished_plan([[streams[k] for k in mine] for mine in placed], nodes, work, pads, share_prompt)


def distinct_traces(tokenized_set: TokenizedSet, matching_tokens: int) -> tuple[int, ...]:
    """For each of the M traces the first whose first T_r tokens are the same, which may be itself."""
    first: dict[bytes, int] = {}
    return tuple(
        first.setdefault(np.asarray(completion[:matching_tokens], dtype=np.int64).tobytes(), trace)
        for trace, completion in enumerate(tokenized_set.completion_ids)
    )


def _pairs(batch: QuestionBatch, tags: ForkingTokens, matching_tokens: int) -> list[SequenceSpec]:
    """Every pair to be scored, in line."""
    pairs = []
    for question, example in enumerate(batch.sets):
        prompt = len(example.prompt_ids)
        scored = [
            (trace, min(len(example.completion_ids[trace]), matching_tokens))
            for trace, first in enumerate(distinct_traces(example, matching_tokens))
            if trace == first
        ]
        for tag, ids in enumerate(tags.ids):
            before = prompt + len(ids) - 1
            pairs += [SequenceSpec(question, trace, tag, before + count, count) for trace, count in scored]
    return pairs


class _Line:
    """Pairs in line, to be cut into runs.

    A run costs what its pairs add along the line, the prompt counted at the first pair of a question, the tag at the
    first of a tag, and, where it starts inside a question or a tag, these once more. A part of a run never costs more
    than the run, so that cutting as late as the limits allow gives the fewest runs.
    """

    def __init__(self, nodes: StreamNodes, max_tokens: int, one_question: bool) -> None:
        count = len(nodes.question)
        new_question = np.ones(count, dtype=bool)
        new_question[1:] = nodes.question[1:] != nodes.question[:-1]
        new_tag = new_question.copy()
        new_tag[1:] |= nodes.tag[1:] != nodes.tag[:-1]

        def along(own: np.ndarray, tag: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            each = own + np.where(new_tag, tag, 0) + np.where(new_question, prompt, 0)
            again = np.where(new_tag, 0, tag) + np.where(new_question, 0, prompt)
            return np.concatenate([[0], np.cumsum(each)]), again

        self.count = count
        self.works, self.work_again = along(nodes.own_work, nodes.tag_work, nodes.prompt_work)
        self.heaviest = int(nodes.alone_work.max())
        tokens, again = along(nodes.own_tokens, nodes.tag_tokens, nodes.prompt_tokens)
        self.farthest = _reach(tokens, again, max_tokens)  # ends of the longest runs within the budget
        if one_question:
            starts = np.append(np.flatnonzero(new_question), count)
            self.farthest = np.minimum(self.farthest, starts[np.cumsum(new_question)])

    def work(self, start: int, stop: int) -> int:
        """Work of a run, in units."""
        return int(self.works[stop] - self.works[start] + self.work_again[start])

    def cut(self, max_work: int | None = None) -> list[tuple[int, int]]:
        """The fewest runs within the limits, (start, stop) each; a run of one pair may exceed them."""
        cuts = self._cuts(max_work, self.count)
        return list(zip(cuts, cuts[1:]))

    def _cuts(self, max_work: int | None, most: int) -> list[int]:
        """Where the fewest runs start and the last one ends; no more than needed to see that they exceed `most`."""
        ends = self.farthest
        if max_work is not None:
            ends = np.minimum(ends, _reach(self.works, self.work_again, max_work))
        stops, cuts, place = ends.tolist(), [0], 0
        while place < self.count and len(cuts) <= most + 1:
            place = stops[place]
            cuts.append(place)
        return cuts

    def even(self, wanted: int) -> list[tuple[int, int]]:
        """`wanted` runs, at least as many as the budget needs and at most as there are pairs, the heaviest light."""
        if wanted == self.count:
            return [(place, place + 1) for place in range(self.count)]
        low = max(int(self.works[-1]) // wanted, self.heaviest) - 1
        high = self.work(0, self.count)  # needs no more runs than the budget alone
        while high - low > 1 + low // _PRECISION:
            middle = (low + high) // 2
            if len(self._cuts(middle, wanted)) <= wanted + 1:
                high = middle
            else:
                low = middle
        return self._halve(self.cut(high), wanted)

    def _halve(self, runs: list[tuple[int, int]], wanted: int) -> list[tuple[int, int]]:
        """Cut the heaviest of the runs in two until there are `wanted`."""
        missing = wanted - len(runs)
        heap = [(-self.work(*run), run) for run in runs if run[1] - run[0] > 1]
        done = [run for run in runs if run[1] - run[0] == 1]
        heapq.heapify(heap)
        for _ in range(missing):
            _, (start, stop) = heapq.heappop(heap)
            half = int(self.works[start]) + self.work(start, stop) // 2
            middle = bisect_left(self.works, half, start + 1, stop - 1)
            for part in ((start, middle), (middle, stop)):
                if part[1] - part[0] > 1:
                    heapq.heappush(heap, (-self.work(*part), part))
                else:
                    done.append(part)
        return sorted(done + [run for _, run in heap])


def _reach(costs: np.ndarray, again: np.ndarray, limit: int) -> np.ndarray:
    """For each start of a run the latest stop, at least the next pair, where it costs no more than `limit`."""
    count = len(again)
    latest = np.searchsorted(costs, costs[:-1] - again + limit, side="right") - 1
    return np.maximum(latest, np.arange(1, count + 1))
