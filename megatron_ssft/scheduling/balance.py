"""Spreading microbatches over data-parallel ranks so that the busiest rank has little to do.

Every rank computes the plan for itself and all must find the same one, whatever their processor: so work is rounded
to integers first, whose sums do not depend on the order of summation.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

_UNITS = 1 << 40
"""Integer units in the total work."""
_TOLERANCE = 1000
"""Refinement ends within 1/_TOLERANCE of the lower bound."""
_MAX_SWAPS = 128
"""Refinement ends after this many swaps."""


def makespan_lower_bound(work: Sequence[float], num_ranks: int) -> float:
    """max(total work / ranks, heaviest item): the busiest of the ranks has at least this."""
    return max(math.fsum(work) / num_ranks, max(work))


def balance(work: Sequence[float], num_ranks: int, *, equal_counts: bool) -> list[list[int]]:
    """Items of each rank, as ascending positions in `work`.

    LPT (longest processing time first onto the least loaded rank), then swaps between the busiest rank and any
    other while they help. LPT gives the first `num_ranks` items to different ranks and a swap changes no count, so
    every rank has an item where there are enough.

    Args:
        work: n works > 0.
        num_ranks: R.
        equal_counts: give every rank exactly n / R items, where n is a multiple of R.
    """
    assert not equal_counts or len(work) % num_ranks == 0
    scale = _UNITS / math.fsum(work)
    units = np.array([max(1, round(w * scale)) for w in work], dtype=np.int64)
    capacity = len(work) // num_ranks if equal_counts else len(work)
    rank_of = _longest_first(units.tolist(), num_ranks, capacity)
    if num_ranks > 1:
        _swap(units, rank_of, num_ranks)
    return [np.flatnonzero(rank_of == rank).tolist() for rank in range(num_ranks)]


def _longest_first(units: list[int], num_ranks: int, capacity: int) -> np.ndarray:
    """LPT with at most `capacity` items a rank: the rank of each item, int64 [n]."""
    rank_of = np.empty(len(units), dtype=np.int64)
    heap = [(0, rank) for rank in range(num_ranks)]
    counts = [0] * num_ranks
    for item in sorted(range(len(units)), key=lambda i: (-units[i], i)):
        load, rank = heap[0]
        rank_of[item] = rank
        counts[rank] += 1
        if counts[rank] < capacity:
            heapq.heapreplace(heap, (load + units[item], rank))
        else:
            heapq.heappop(heap)
    return rank_of


def _swap(units: np.ndarray, rank_of: np.ndarray, num_ranks: int) -> None:
    """Improve `rank_of` in place by swaps of two items, one of them on the busiest rank."""
    loads = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(loads, rank_of, units)
    goal = max(-(-int(loads.sum()) // num_ranks), int(units.max()))
    goal += goal // _TOLERANCE
    for _ in range(_MAX_SWAPS):
        busiest = int(loads.argmax())
        if loads[busiest] <= goal:
            return
        swap = _best_swap(units, rank_of, loads, busiest)
        if swap is None:
            return
        given, taken = swap
        partner = rank_of[taken]
        rank_of[given], rank_of[taken] = partner, busiest
        loads[busiest] -= units[given] - units[taken]
        loads[partner] += units[given] - units[taken]


def _best_swap(units: np.ndarray, rank_of: np.ndarray, loads: np.ndarray, busiest: int) -> tuple[int, int] | None:
    """(item of the busiest rank, item of another) whose swap leaves the two ranks the least makespan; None: no gain.

    For every item of the busiest rank and every partner the best counterpart is the item that is lighter by half the
    difference of the two loads; a search in the items sorted by (rank, work) finds its neighbours.
    """
    stride = 2 * _UNITS  # above the work of any item
    order = np.argsort(rank_of * stride + units, kind="stable")
    keys = (rank_of * stride + units)[order]
    mine = np.flatnonzero(rank_of == busiest)
    partners = np.flatnonzero(loads < loads[busiest])
    wanted = units[mine, None] - (loads[busiest] - loads[partners]) // 2
    position = np.searchsorted(keys, partners * stride + np.maximum(wanted, 0))
    nearest = order[np.clip(np.stack([position - 1, position]), 0, len(order) - 1)]  # [2, items, partners]
    shift = units[mine, None] - units[nearest]
    span = np.maximum(loads[busiest] - shift, loads[partners] + shift)
    span[rank_of[nearest] != partners] = loads[busiest]
    best = int(span.argmin())
    if span.flat[best] >= loads[busiest]:
        return None
    return int(mine[best // len(partners) % len(mine)]), int(nearest.flat[best])
