"""Spreading parts of questions over ranks: what stays together computes its prompt once, what is divided evens out."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_ssft.scheduling.shared_nodes import UNITS, ItemNodes, Part, question_parts

_STRIDE = 2 * UNITS
"""Above the work of anything."""
_TOLERANCE = 500
"""Exchanges end within 1/_TOLERANCE of the goal."""
_MAX_EXCHANGES = 256
_MAX_COMBINATIONS = 2048
"""Combinations looked at for an exchange."""
_SMALL_STEP = 1024
"""With at most this many sequences several ways to divide the questions are tried."""


def spread_over_ranks(
    nodes: ItemNodes, num_ranks: int, max_tokens: int, goal: int, share_prompt: bool
) -> list[list[Part]]:
    """The parts of each rank, of at most `max_tokens` tokens or one item, with a small makespan.

    LPT over parts, then exchanges of a part or a sequence of the busiest rank for one (or nothing) of another. First
    the parts are whole questions, as far as the budget and an even share of the work allow; where that does not come
    near the goal, also larger and smaller ones.

    Args:
        nodes: S items, longest first.
        num_ranks: R.
        max_tokens: tokens in a part.
        goal: makespan that need not be improved upon, in units of work.
        share_prompt: whether it is worth while to keep questions together at all.
    """
    enough = goal + goal // _TOLERANCE
    limits = [goal, _STRIDE, goal // 2, goal // 4, 0] if share_prompt else [0]
    best: list[list[Part]] = []
    for limit in limits if len(nodes.question) <= _SMALL_STEP else limits[:1]:
        ranks = _longest_first(question_parts(nodes, max_tokens, limit), num_ranks, max_tokens)
        exchange = _Exchange(nodes, ranks, max_tokens)
        mean = sum(exchange.loads) // num_ranks  # above the goal where the budget divides questions
        exchange.run(max(enough, mean + mean // _TOLERANCE))
        if not best or max(exchange.loads) < max(map(_load, best)):
            best = ranks
        if max(exchange.loads) <= enough:
            break
    return best


def _load(parts: list[Part]) -> int:
    return sum(part.work for part in parts)


def _longest_first(parts: list[Part], num_ranks: int, max_tokens: int) -> list[list[Part]]:
    """LPT: heaviest first onto the least loaded rank."""
    ranks: list[dict[int, list[Part]]] = [{} for _ in range(num_ranks)]  # by question
    heap = [(0, rank) for rank in range(num_ranks)]
    for part in sorted(parts, key=lambda p: (-p.work, p.items[0])):
        load, rank = heap[0]
        alike = ranks[rank].get(part.question)
        if alike is None:
            ranks[rank][part.question] = [part]
            load += part.work
        else:
            load -= _load(alike)
            _put(part, alike, max_tokens)
            load += _load(alike)
        heapq.heapreplace(heap, (load, rank))
    return [[part for alike in by_question.values() for part in alike] for by_question in ranks]


def _put(part: Part, others: list[Part], max_tokens: int) -> None:
    """Add a part to those of a rank: to one of its question, if the budget allows."""
    for other in others:
        if other.question == part.question and other.joined_tokens(part) <= max_tokens:
            for item in part.items:
                other.add(item)
            return
    others.append(part)


@dataclass(frozen=True)
class _Bundles:
    """What a rank can give away: nothing (first), each part, each item of a part of several. Sorted by cost."""

    cost: np.ndarray
    """int64 [n]: work that arrives where the bundle goes (at most; joining a part there saves some)"""
    gain: np.ndarray
    """int64 [n]: work that leaves with it"""
    what: list[tuple[Part | None, int]]
    """n pairs of a part and an item of it, -1 for the whole part"""


class _Exchange:
    """Local search on `ranks`, which it changes in place."""

    def __init__(self, nodes: ItemNodes, ranks: list[list[Part]], max_tokens: int) -> None:
        self.nodes = nodes
        self.ranks = ranks
        self.max_tokens = max_tokens
        self.loads = [_load(parts) for parts in ranks]
        self.bundles: list[_Bundles | None] = [None] * len(ranks)

    def run(self, goal: int) -> None:
        """Exchange until the busiest rank has at most `goal`, no exchange helps, or it has been enough."""
        for _ in range(_MAX_EXCHANGES):
            by_load = sorted(range(len(self.ranks)), key=lambda r: (self.loads[r], r))
            busiest, others = by_load[-1], by_load[:-1]
            if self.loads[busiest] <= goal or not others:
                return
            near = max(2, _MAX_COMBINATIONS // len(self._bundles_of(busiest).what))
            found = self._best(busiest, others[:near])
            if found is None and near < len(others):
                found = self._best(busiest, others[near:])
            if found is None:
                return
            given, partner, taken = found
            self._move(given, busiest, partner)
            self._move(taken, partner, busiest)
            for rank in (busiest, partner):
                self.loads[rank] = _load(self.ranks[rank])
                self.bundles[rank] = None

    def _bundles_of(self, rank: int) -> _Bundles:
        found = self.bundles[rank]
        if found is None:
            entries: list[tuple[int, int, Part | None, int]] = [(0, 0, None, -1)]
            for part in self.ranks[rank]:
                entries.append((part.work, part.work, part, -1))
                if len(part.items) > 1:
                    alone = self.nodes.alone_work
                    entries += [(alone[item], part.own_gain(item), part, item) for item in part.items]
            entries[1:] = sorted(entries[1:], key=lambda e: e[0])
            numbers = np.array([e[:2] for e in entries], dtype=np.int64)
            found = _Bundles(numbers[:, 0], numbers[:, 1], [e[2:] for e in entries])
            self.bundles[rank] = found
        return found

    def _best(self, busiest: int, partners: list[int]) -> tuple[tuple, int, tuple] | None:
        """(given, partner, taken) that leaves the two ranks the least makespan; None: no gain.

        Taking back about (what I give + what arrives there - the difference of the two loads) / 2 makes two ranks
        equal; a search in the partners' sorted costs finds the neighbours of that.
        """
        mine = self._bundles_of(busiest)
        theirs = [self._bundles_of(rank) for rank in partners]
        offset = np.arange(len(partners)) * _STRIDE
        sizes = np.array([len(bundles.what) for bundles in theirs])
        first = np.cumsum(sizes) - sizes
        cost = np.concatenate([bundles.cost for bundles in theirs])
        gain = np.concatenate([bundles.gain for bundles in theirs])
        load, loads = self.loads[busiest], np.array([self.loads[rank] for rank in partners])
        leaves, arrives = mine.gain[1:, None], mine.cost[1:, None]
        wanted = np.clip((loads - load + leaves + arrives) // 2, 0, _STRIDE - 1)
        after = np.searchsorted(cost + np.repeat(offset, sizes), wanted + offset)
        near = np.clip(np.stack([after - 1, after]), first, first + sizes - 1)  # [2, mine, partners]
        span = np.maximum(load - leaves + cost[near], loads - gain[near] + arrives)
        best = int(span.argmin())
        if span.flat[best] >= load:
            return None
        _, given, partner = np.unravel_index(best, span.shape)
        taken = theirs[partner].what[near.flat[best] - first[partner]]
        return mine.what[given + 1], partners[partner], taken

    def _move(self, bundle: tuple[Part | None, int], source: int, target: int) -> None:
        part, item = bundle
        if part is None:
            return
        if item < 0:
            self.ranks[source].remove(part)
        else:
            part.remove(item)
            part = Part(self.nodes, item)
        _put(part, self.ranks[target], self.max_tokens)
