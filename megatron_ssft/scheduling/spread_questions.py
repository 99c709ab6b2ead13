"""Spreading parts of questions over ranks: what stays together computes its prompt once, what is divided evens out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ssft.scheduling.balance import UNITS, best_exchange, longest_first
from megatron_ssft.scheduling.shared_nodes import ItemNodes, Part, question_parts

Bundle = tuple[Part | None, int]
"""A part and an item of it, -1 for the whole part; None: nothing."""
_NO_LIMIT = 2 * UNITS
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
    limits = [goal, _NO_LIMIT, goal // 2, goal // 4, 0] if share_prompt else [0]
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
    """LPT; a part that comes to others of its question shares what they have in common."""
    ranks: list[dict[int, list[Part]]] = [{} for _ in range(num_ranks)]  # by question

    def place(part: Part, rank: int, load: int) -> int:
        alike = ranks[rank].setdefault(part.question, [])
        before = _load(alike)
        _put(part, alike, max_tokens)
        return load + _load(alike) - before

    longest_first(sorted(parts, key=lambda p: (-p.work, p.items[0])), num_ranks, place)
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
    what: list[Bundle]
    """n of them"""


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
            exchange = self._best(busiest, others[:near])
            if exchange is None and near < len(others):
                exchange = self._best(busiest, others[near:])
            if exchange is None:
                return
            given, partner, taken = exchange
            self._move(given, busiest, partner)
            self._move(taken, partner, busiest)
            for rank in (busiest, partner):
                self.loads[rank] = _load(self.ranks[rank])
                self.bundles[rank] = None

    def _bundles_of(self, rank: int) -> _Bundles:
        bundles = self.bundles[rank]
        if bundles is None:
            entries: list[tuple[int, int, Part | None, int]] = [(0, 0, None, -1)]
            for part in self.ranks[rank]:
                entries.append((part.work, part.work, part, -1))
                if len(part.items) > 1:
                    alone = self.nodes.alone_work
                    entries += [(alone[item], part.own_gain(item), part, item) for item in part.items]
            entries[1:] = sorted(entries[1:], key=lambda e: e[0])
            numbers = np.array([e[:2] for e in entries], dtype=np.int64)
            bundles = _Bundles(numbers[:, 0], numbers[:, 1], [e[2:] for e in entries])
            self.bundles[rank] = bundles
        return bundles

    def _best(self, busiest: int, partners: list[int]) -> tuple[Bundle, int, Bundle] | None:
        """(given, partner, taken) that leaves the two ranks the least makespan; None: no gain."""
        own = self._bundles_of(busiest)
        offers = [self._bundles_of(rank) for rank in partners]
        exchange = best_exchange(
            self.loads[busiest],
            own.gain[1:],
            own.cost[1:],
            np.array([self.loads[rank] for rank in partners]),
            np.concatenate([bundles.cost for bundles in offers]),
            np.concatenate([bundles.gain for bundles in offers]),
            np.array([len(bundles.what) for bundles in offers]),
        )
        if exchange is None:
            return None
        given, partner, taken = exchange
        before = sum(len(bundles.what) for bundles in offers[:partner])
        return own.what[given + 1], partners[partner], offers[partner].what[taken - before]

    def _move(self, bundle: Bundle, source: int, target: int) -> None:
        part, item = bundle
        if part is None:
            return
        if item < 0:
            self.ranks[source].remove(part)
        else:
            part.remove(item)
            part = Part(self.nodes, item)
        _put(part, self.ranks[target], self.max_tokens)
