"""Segments of a stream put into few groups of similar shape, so that each group is one call of an attention kernel.

Hundreds of short segments would otherwise cost hundreds of calls. Within a group all are filled up to the longest;
the grouping weighs that against the price of a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_ssft.records import Segment

CALL_FLOPS = 2e7
"""Cost of a call beside its arithmetic: about 0.2 ms with gathers and backward, at 100 GFLOP/s (measured)."""
MAX_BLOCKS = 8
BLOCK = 256
"""A long segment with context is cut into at most MAX_BLOCKS runs of queries, at least BLOCK long. A masked kernel
computes what the mask hides; in blocks that is an eighth of the square at most."""
MAX_MASK = 1 << 25
"""Elements of a mask, at most; beyond it a group is halved."""


@dataclass(frozen=True)
class SegmentGroup:
    """B segments filled up to Lq queries and Lk keys."""

    queries: np.ndarray
    """int64 [B, Lq]: places in the stream; 0 where filled up"""
    keys: np.ndarray
    """int64 [B, Lk]: places in the stream, context first, then the segment's own; 0 where filled up"""
    contexts: np.ndarray
    """int64 [B]: query i sees keys 0..context + i"""
    places: tuple[np.ndarray, np.ndarray, np.ndarray]
    """(row, column, place in the stream) of every query that is not filling"""


def group_segments(segments: Iterable[Segment], width: int) -> list[SegmentGroup]:
    """Groups that cover every segment once.

    Args:
        width: channels of all query heads, which decides what a pair of query and key costs.
    """
    call = CALL_FLOPS / (4 * width)  # in pairs
    free: list[Segment] = []
    bound: list[Segment] = []
    for segment in segments:
        (bound if segment.context else free).append(segment)
    blocks = [block for segment in bound for block in _blocks(segment)]
    groups = []
    for members, masked in ((free, False), (blocks, True)):
        for run in _cheapest_runs(members, call, masked):
            groups += [_group(part) for part in _within_memory(run)]
    return groups


def _blocks(segment: Segment) -> list[Segment]:
    """The segment as a chain of runs of queries: each sees the earlier ones as context."""
    size = max(BLOCK, -(-segment.length // MAX_BLOCKS))
    return [
        Segment(
            segment.start + offset,
            min(size, segment.length - offset),
            (*segment.context, (segment.start, offset)) if offset else segment.context,
        )
        for offset in range(0, segment.length, size)
    ]


def _cheapest_runs(segments: list[Segment], call: float, masked: bool) -> list[list[Segment]]:
    """Cut the segments, sorted by shape, into runs with the least sum of padded pairs and calls.

    Dynamic programming over the distinct shapes: best[j] is the least cost of the first j of them.
    """
    if not segments:
        return []
    by_shape: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        by_shape.setdefault((segment.length, segment.num_context), []).append(segment)
    shapes = sorted(by_shape)
    lengths, contexts = np.array(shapes, dtype=np.float64).T
    counts = np.concatenate([[0], np.cumsum([len(by_shape[s]) for s in shapes])])
    best, cut = np.zeros(len(shapes) + 1), np.zeros(len(shapes) + 1, dtype=np.int64)
    for j in range(1, len(shapes) + 1):
        longest = lengths[j - 1]  # shapes are sorted by length
        deepest = np.maximum.accumulate(contexts[j - 1 :: -1])[::-1]  # of the shapes i..j-1, for every i
        # The causal kernel skips half of the square, the masked one nothing.
        pairs = longest * (deepest + longest) if masked else longest * longest / 2
        cost = best[:j] + call + (counts[j] - counts[:j]) * pairs
        cut[j] = cost.argmin()
        best[j] = cost[cut[j]]
    runs, stop = [], len(shapes)
    while stop:
        runs.append([segment for shape in shapes[cut[stop] : stop] for segment in by_shape[shape]])
        stop = cut[stop]
    return runs[::-1]


def _within_memory(run: list[Segment]) -> list[list[Segment]]:
    longest = max(s.length for s in run)
    mask = longest * (longest + max(s.num_context for s in run))
    rows = 1 if len({s.num_context for s in run}) == 1 else len(run)  # one mask for all where contexts agree
    if len(run) == 1 or rows * mask <= MAX_MASK:
        return [run]
    middle = len(run) // 2
    return _within_memory(run[:middle]) + _within_memory(run[middle:])


def _group(run: list[Segment]) -> SegmentGroup:
    lengths = np.array([s.length for s in run])
    contexts = np.array([s.num_context for s in run])
    queries = np.zeros((len(run), lengths.max()), dtype=np.int64)
    keys = np.zeros((len(run), (lengths + contexts).max()), dtype=np.int64)
    for row, segment in enumerate(run):
        own = np.arange(segment.start, segment.start + segment.length)
        queries[row, : segment.length] = own
        ranges = [np.arange(start, start + length) for start, length in segment.context]
        keys[row, : contexts[row] + segment.length] = np.concatenate([*ranges, own])
    rows, columns = np.nonzero(np.arange(lengths.max()) < lengths[:, None])
    return SegmentGroup(queries, keys, contexts, (rows, columns, queries[rows, columns]))
