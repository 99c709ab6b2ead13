"""How ranks are balanced: longest first, then exchanges with the busiest rank, so that it has little to do.

`balance` spreads whole microbatches. The steps it is made of, `longest_first` and `best_exchange`, also spread parts
of questions (`spread_questions`); `split_heaviest` makes more and lighter microbatches out of few.

Every rank computes the plan for itself and all must find the same one, whatever their processor: so work is rounded
to integers first, whose sums do not depend on the order of summation.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

UNITS = 1 << 40
"""Integer units in the total work."""
_STRIDE = 2 * UNITS
"""Above the work of anything."""
_TOLERANCE = 1000
"""Refinement ends within 1/_TOLERANCE of the lower bound."""
_MAX_SWAPS = 128
"""Refinement ends after this many swaps."""

Item = TypeVar("Item")


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
    scale = UNITS / math.fsum(work)
    units = [max(1, round(w * scale)) for w in work]
    capacity = len(work) // num_ranks if equal_counts else len(work)
    rank_of = np.empty(len(work), dtype=np.int64)
    counts = [0] * num_ranks

    def place(item: int, rank: int, load: int) -> int | None:
        rank_of[item] = rank
        counts[rank] += 1
        return load + units[item] if counts[rank] < capacity else None

    longest_first(sorted(range(len(work)), key=lambda i: (-units[i], i)), num_ranks, place)
    if num_ranks > 1:
        _swap(np.array(units, dtype=np.int64), rank_of, num_ranks)
    return [np.flatnonzero(rank_of == rank).tolist() for rank in range(num_ranks)]


def longest_first(items: Iterable[Item], num_ranks: int, place: Callable[[Item, int, int], int | None]) -> None:
    """LPT: each item in turn goes to the rank with the least load, the lowest of several.

    Args:
        items: heaviest first.
        num_ranks: R.
        place: called with (item, rank, load of the rank); puts the item there and returns the rank's new load, or
            None where it takes no more.
    """
    heap = [(0, rank) for rank in range(num_ranks)]
    for item in items:
        load, rank = heap[0]
        new_load = place(item, rank, load)
        if new_load is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (new_load, rank))


def _swap(units: np.ndarray, rank_of: np.ndarray, num_ranks: int) -> None:
    """Improve `rank_of` in place by swaps of two items, one of them on the busiest rank."""
    loads = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(loads, rank_of, units)
    counts = np.bincount(rank_of, minlength=num_ranks)
    goal = max(-(-int(loads.sum()) // num_ranks), int(units.max()))
    goal += goal // _TOLERANCE
    for _ in range(_MAX_SWAPS):
        busiest = int(loads.argmax())
        if loads[busiest] <= goal:
            return
        is_partner = (loads < loads[busiest]) & (counts > 0)
        if not is_partner.any():
            return
        partners = np.flatnonzero(is_partner)
        own = np.flatnonzero(rank_of == busiest)
        order = np.argsort(rank_of * _STRIDE + units, kind="stable")  # rank by rank, ascending work
        others = order[is_partner[rank_of[order]]]
        exchange = best_exchange(
            int(loads[busiest]), units[own], units[own], loads[partners], units[others], units[others], counts[partners]
        )
        if exchange is None:
            return
        given, partner, taken = own[exchange[0]], partners[exchange[1]], others[exchange[2]]
        rank_of[given], rank_of[taken] = partner, busiest
        loads[busiest] -= units[given] - units[taken]
        loads[partner] += units[given] - units[taken]


def best_exchange(
    load: int,
    leaves: np.ndarray,
    arrives: np.ndarray,
    loads: np.ndarray,
    cost: np.ndarray,
    gain: np.ndarray,
    sizes: np.ndarray,
) -> tuple[int, int, int] | None:
    """(what the busiest rank gives, the partner, what it takes) that leaves the two ranks the least makespan.

    None: no exchange makes the busiest rank's load less. Taking back about (what leaves + what arrives at the partner
    - the difference of the two loads) / 2 makes two ranks equal; a search in the partners' sorted costs finds the
    neighbours of that.

    Args:
        load: of the busiest rank.
        leaves: int64 [n], work that each thing it can give takes away.
        arrives: int64 [n], work that it adds to the partner.
        loads: int64 [p], of each partner.
        cost: int64, work that each thing a partner can give adds to the busiest rank; partner by partner, ascending.
        gain: int64, work that it takes away from the partner.
        sizes: int64 [p], how many things each partner can give, at least one.

    Returns:
        Positions in `leaves`, `loads` and `cost`.
    """
    offset = np.arange(len(loads)) * _STRIDE
    first = np.cumsum(sizes) - sizes
    arrives = arrives[:, None]
    load_left = load - leaves[:, None]
    target = np.clip(-((load_left - loads - arrives) // 2), 0, _STRIDE - 1)
    after = np.searchsorted(cost + np.repeat(offset, sizes), target + offset)
    near = np.stack([after - 1, after])  # [2, n, p]
    offered = (first <= near) & (near < first + sizes)
    near = np.where(offered, near, first)
    span = np.where(offered, np.maximum(load_left + cost[near], loads - gain[near] + arrives), load)
    best = int(span.argmin())
    if span.flat[best] >= load:
        return None
    _, given, partner = np.unravel_index(best, span.shape)
    return int(given), int(partner), int(near.flat[best])


def split_heaviest(
    pieces: list[Item],
    count: int,
    key: Callable[[Item], tuple[float, ...]],
    halve: Callable[[Item], tuple[Item, Item] | None],
) -> None:
    """Halve the piece with the least key until there are `count` pieces, in place, or none can be halved.

    Args:
        pieces: a piece that is halved is replaced by one half; the other is appended.
        count: pieces wanted.
        key: what comes first is halved first; begins with the negative work, for instance.
        halve: two pieces, or None where it cannot be divided.
    """
    if len(pieces) < count:
        for _ in halvings(pieces, key, halve):
            if len(pieces) == count:
                return


def halvings(
    pieces: list[Item], key: Callable[[Item], tuple[float, ...]], halve: Callable[[Item], tuple[Item, Item] | None]
) -> Iterator[int]:
    """As `split_heaviest`, one halving at a time: the place of the half that took the other's place; it is appended."""
    heap = [(key(piece), place) for place, piece in enumerate(pieces)]
    heapq.heapify(heap)
    while heap:
        _, place = heapq.heappop(heap)
        halves = halve(pieces[place])
        if halves is None:
            continue
        pieces[place] = halves[0]
        pieces.append(halves[1])
        for half in (place, len(pieces) - 1):
            heapq.heappush(heap, (key(pieces[half]), half))
        yield place
