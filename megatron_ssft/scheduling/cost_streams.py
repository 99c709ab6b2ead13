"""Planner of the cost pass in token streams: which (tag, trace) pair is scored in which stream of which rank."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

from megatron_ssft.layouts.packed import stream_microbatch
from megatron_ssft.records import PAD, ForkingTokens, MicrobatchPlan, QuestionBatch
from megatron_ssft.scheduling.assembly import assemble_streams
from megatron_ssft.scheduling.balance import balance, split_heaviest
from megatron_ssft.scheduling.limits import StreamLimits
from megatron_ssft.scheduling.pad_bound import pad_lower_bound
from megatron_ssft.scheduling.sequences import cost_sequences
from megatron_ssft.scheduling.shared_nodes import StreamNodes, stream_nodes
from megatron_ssft.scheduling.work import WorkModel

Run = tuple[int, int]
"""(start, stop) in the line of pairs: a stream."""
_PART = 6
"""Numbers of streams that are tried to fill a pipeline differ by one of so many."""
_ENOUGH = 0.99
"""No more numbers are tried where they could gain no more than this."""
_PATIENCE = 6
"""Numbers tried after the best so far."""
_PRECISION = 1000
"""The greatest work of a stream is found within 1/_PRECISION."""


def plan_cost_streams(
    batch: QuestionBatch, matching_tokens: int, tags: ForkingTokens, limits: StreamLimits, work: WorkModel
) -> MicrobatchPlan:
    """All pairs of a tag and a trace of its question once, each trace cut to its first T_r tokens.

    Traces of a question that agree in their first T_r tokens are scored once: the first of them appears
    (`distinct_traces`). The pairs stand in a line, question by question, tag by tag, trace by trace, which is cut
    into streams of at most `max_tokens` tokens or of one longer pair; so a cut repeats at most one prompt and one
    tag. There are as few streams as the budget allows, but as many on every rank, and at least `min_microbatches`
    there if there are pairs enough; with pipeline stages as many as take the least time, if they do not become too
    small. Within that they are as even in work as can be, and then spread over the ranks.
    `fewest` below is therefore the fewest streams that a cut of the line needs, and the plan's PAD lower bound holds
    among such cuts.

    PADs, each a stream, appear only where pairs run out: on ranks that would have nothing to do and, with
    `group_size` > 1, to make every rank's count the same multiple of it. No way to cut the line needs fewer.

    Returns:
        The plan; its `makespan_lower_bound` is max(work with every prompt and tag once / R, heaviest pair).

    Raises:
        ValueError: the batch has no traces.
    """
    pairs = cost_sequences(batch, matching_tokens, tags, distinct=True)
    if not pairs:
        raise ValueError("there is nothing to score: the batch has no traces")
    num_ranks, group_size, share_prompt = limits.num_ranks, limits.group_size, limits.layout.share_prompt
    nodes = stream_nodes(batch, pairs, tags, work, share_prompt)
    line = _Line(nodes, limits.max_tokens, limits.layout.one_question)
    fewest = len(line.cut())
    count = _stream_count(fewest, len(pairs), limits)
    if limits.pipeline.stages > 1:
        count = _filling_count(line, count, limits)
    runs = line.even(min(count, len(pairs)))
    num_pads = count - len(runs)
    streams = [stream_microbatch(batch, pairs[start:stop], tags, share_prompt) for start, stop in runs]
    streams += [stream_microbatch(batch, [PAD], tags, share_prompt)] * num_pads
    works = [max(1, line.work(*run)) for run in runs] + [1] * num_pads
    placed = balance(works, num_ranks, equal_counts=count % num_ranks == 0)
    ranks = [[streams[k] for k in of_rank] for of_rank in placed]
    least_pads = pad_lower_bound(len(pairs), fewest, num_ranks, equal_counts=group_size > 1, group_size=group_size)
    return assemble_streams(ranks, nodes, work, limits.layout, least_pads, limits.pipeline)


def _stream_count(fewest: int, num_pairs: int, limits: StreamLimits) -> int:
    """How many streams to make, PADs included, where the budget needs `fewest`."""
    step = limits.num_ranks * limits.group_size
    least = -(-fewest // step) * step
    count = max(least, -(-limits.min_microbatches // limits.group_size) * step)
    if count > num_pairs:
        count = max(least, num_pairs // step * step)
    if limits.group_size == 1 and count > num_pairs:  # counts may differ, so only a rank with nothing to do needs a PAD
        count = max(num_pairs, limits.num_ranks)
    return count


def _filling_count(line: _Line, count: int, limits: StreamLimits) -> int:
    """How many streams, `count` or more, take a pipeline the least time.

    In a forward pass alone the stages wait for the heaviest stream p - 1 times, and for 1 / v of it if they have v
    chunks. More streams are lighter and repeat more prompts and tags. On average they have the smallest allowed size.
    """
    pipeline, num_ranks = limits.pipeline, limits.num_ranks
    step = num_ranks * limits.group_size
    best, least, misses, tried = count, math.inf, 0, count
    while tried <= line.count and misses < _PATIENCE:
        starts, stops = np.array(line.even(tried)).T
        if tried > count and int(line.tokens_of(starts, stops).sum()) < tried * limits.smallest_stream:
            break
        works = line.works_of(starts, stops)
        busy = int(works.sum()) / num_ranks
        time = busy + int(works.max()) * (pipeline.stages - 1) / pipeline.chunks
        misses += 1
        if time < least:
            best, least, misses = tried, time, 0
        if busy > _ENOUGH * least:  # more streams have more work
            break
        tried += max(1, tried // (_PART * step)) * step
    return best


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
        self.tokens, self.tokens_again = tokens, again
        self.farthest = _reach(tokens, again, max_tokens)  # ends of the longest runs within the budget
        if one_question:
            starts = np.append(np.flatnonzero(new_question), count)
            self.farthest = np.minimum(self.farthest, starts[np.cumsum(new_question)])

    def work(self, start: int, stop: int) -> int:
        """Work of a run, in units."""
        return int(self.works[stop] - self.works[start] + self.work_again[start])

    def works_of(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Works of several runs, int64."""
        return self.works[stops] - self.works[starts] + self.work_again[starts]

    def tokens_of(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Tokens of several runs, int64."""
        return self.tokens[stops] - self.tokens[starts] + self.tokens_again[starts]

    def cut(self, max_work: int | None = None) -> list[Run]:
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

    def even(self, count: int) -> list[Run]:
        """`count` runs, at least as many as the budget needs and at most as there are pairs, the heaviest light."""
        if count == self.count:
            return [(place, place + 1) for place in range(self.count)]
        low = max(int(self.works[-1]) // count, self.heaviest) - 1
        high = self.work(0, self.count)  # needs no more runs than the budget alone
        while high - low > 1 + low // _PRECISION:
            middle = (low + high) // 2
            if len(self._cuts(middle, count)) <= count + 1:
                high = middle
            else:
                low = middle
        runs = self.cut(high)
        split_heaviest(runs, count, key=lambda run: (-self.work(*run), *run), halve=self._halves)
        return sorted(runs)

    def _halves(self, run: Run) -> tuple[Run, Run] | None:
        """Two runs of about the same work."""
        start, stop = run
        if stop - start == 1:
            return None
        half = int(self.works[start]) + self.work(start, stop) // 2
        middle = bisect_left(self.works, half, start + 1, stop - 1)
        return (start, middle), (middle, stop)


def _reach(costs: np.ndarray, again: np.ndarray, limit: int) -> np.ndarray:
    """For each start of a run the latest stop, at least the next pair, where it costs no more than `limit`."""
    count = len(again)
    latest = np.searchsorted(costs, costs[:-1] - again + limit, side="right") - 1
    return np.maximum(latest, np.arange(1, count + 1))
