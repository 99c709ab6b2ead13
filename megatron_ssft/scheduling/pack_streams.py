"""Parts of questions into streams: few of them, as many as asked for, and how few there can be at all."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable

import numpy as np

from megatron_ssft.scheduling.shared_nodes import OPEN_PARTS, ItemNodes, Part, StreamNodes, question_parts


class _Stream:
    """A stream being filled."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.tokens = 0
        self.tags: dict[int, set[int]] = {}  # question -> tags

    def added_tokens(self, part: Part) -> int:
        """Tokens that the part would add."""
        if part.question not in self.tags:
            return part.tokens
        nodes, present = part.nodes, self.tags[part.question]
        known = {nodes.tag[item]: nodes.tag_tokens[item] for item in part.items if nodes.tag[item] in present}
        return part.tokens - nodes.prompt_tokens[part.items[0]] - sum(known.values())

    def add(self, part: Part) -> None:
        self.tokens += self.added_tokens(part)
        self.items += part.items
        self.tags.setdefault(part.question, set()).update(part.tags)


def pack(parts: Iterable[Part], max_tokens: int, one_question: bool) -> list[list[int]]:
    """Items of each stream: the parts by best-fit decreasing, next to others of their question where these have room.

    A stream has at most `max_tokens` tokens, or it is a single part, which may have more.
    """
    streams: list[_Stream] = []
    of_question: dict[int, list[int]] = {}
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, stream), ascending
    for part in sorted(parts, key=lambda p: (-p.tokens, p.items[0])):
        place = None
        for other in of_question.get(part.question, ())[-OPEN_PARTS:]:
            if streams[other].tokens + streams[other].added_tokens(part) <= max_tokens:
                place = other
                break
        if place is None and not one_question:
            best = bisect.bisect_left(rooms, (part.tokens, -1))
            place = rooms[best][1] if best < len(rooms) else None
        if place is None:
            place = len(streams)
            streams.append(_Stream())
        else:
            del rooms[bisect.bisect_left(rooms, (max_tokens - streams[place].tokens, place))]
        streams[place].add(part)
        bisect.insort(rooms, (max_tokens - streams[place].tokens, place))
        places = of_question.setdefault(part.question, [])
        if place not in places[-OPEN_PARTS:]:
            places.append(place)
    return [stream.items for stream in streams]


def pack_tightly(nodes: ItemNodes, max_tokens: int, one_question: bool) -> list[list[int]]:
    """All items in as few streams as several ways of `pack` find."""
    ways = [question_parts(nodes, max_tokens, limit) for limit in (1 << 62, 0)]
    return min((pack(parts, max_tokens, one_question) for parts in ways), key=len)


def split_to(streams: list[list[int]], count: int, nodes: ItemNodes) -> None:
    """Split streams of several items until there are `count`, in place; there have to be as many items.

    Streams of several questions come first, divided between questions, which costs nothing; then the heaviest.
    """

    def key(items: list[int]) -> tuple[bool, int]:
        return (len({nodes.question[item] for item in items}) == 1, -nodes.work(items))

    heap = [(*key(items), k) for k, items in enumerate(streams) if len(items) > 1]
    heapq.heapify(heap)
    while len(streams) < count:
        k = heapq.heappop(heap)[2]
        streams[k], other = _halves(streams[k], nodes)
        streams.append(other)
        for half in (k, len(streams) - 1):
            if len(streams[half]) > 1:
                heapq.heappush(heap, (*key(streams[half]), half))


def _halves(items: list[int], nodes: ItemNodes) -> tuple[list[int], list[int]]:
    """Two streams of about the same work: by questions if there are several, else by tags, else by items."""
    for name in (lambda i: nodes.question[i], lambda i: nodes.tag[i], lambda i: i):
        blocks: dict[int, list[int]] = {}
        for item in items:
            blocks.setdefault(name(item), []).append(item)
        if len(blocks) > 1:
            break
    halves: tuple[list[int], list[int]] = ([], [])
    loads = [0, 0]
    for block in sorted(blocks.values(), key=lambda b: (-nodes.work(b), b[0])):
        side = 0 if (loads[0], len(halves[0])) <= (loads[1], len(halves[1])) else 1
        halves[side].extend(block)
        loads[side] += nodes.work(block)
    return halves


def fewest_streams(nodes: StreamNodes, max_tokens: int, one_question: bool) -> int:
    """A lower bound on the number of streams of at most `max_tokens` tokens, or one sequence, that hold everything.

    The greater of two bounds. A sequence of more tokens than the budget takes a stream alone, so both count these
    and go on with the others.

    1. Sequences of which no two fit into one stream need a stream each. Such a set is built greedily, longest first.
    2. Tokens. A question with t tokens below its prompt of p stands in at least n = ceil(t / (budget - p)) streams,
       and in each its prompt stands anew; so the streams hold at least the sum of t + n p tokens.

    If streams hold one question only, the bounds hold question by question and add up.
    """
    alone = nodes.alone_tokens
    fits = np.flatnonzero(alone <= max_tokens)
    fits = fits[np.argsort(-alone[fits], kind="stable")]
    oversize = len(alone) - len(fits)
    if not len(fits):
        return oversize
    questions = nodes.question[fits]
    groups = [fits[questions == q] for q in np.unique(questions)]
    if one_question:
        return oversize + sum(
            max(_apart(nodes, group, max_tokens), _least_times(nodes, group, max_tokens)) for group in groups
        )
    tokens = sum(
        _below_prompt(nodes, group) + _least_times(nodes, group, max_tokens) * int(nodes.prompt_tokens[group[0]])
        for group in groups
    )
    return oversize + max(_apart(nodes, fits, max_tokens), -(-tokens // max_tokens))


def _below_prompt(nodes: StreamNodes, group: np.ndarray) -> int:
    """Tokens of sequences of one question under its prompt, every tag once."""
    _, first = np.unique(nodes.tag[group], return_index=True)
    return int(nodes.own_tokens[group].sum() + nodes.tag_tokens[group[first]].sum())


def _least_times(nodes: StreamNodes, group: np.ndarray, max_tokens: int) -> int:
    """How many streams at least a question stands in, by its tokens."""
    room = max_tokens - int(nodes.prompt_tokens[group[0]])
    return max(1, -(-_below_prompt(nodes, group) // room)) if room > 0 else 1  # no room: nothing below the prompt


def _apart(nodes: StreamNodes, items: np.ndarray, max_tokens: int) -> int:
    """How many items, taken by descending length, were found of which no two fit into one stream."""
    count, shortest = 0, max_tokens + 1
    below: dict[tuple[int, int], int] = {}  # (question, tag or -1 for all) -> least tokens below that node
    columns = (nodes.alone_tokens, nodes.question, nodes.tag, nodes.prompt_tokens, nodes.tag_tokens)
    for alone, question, tag, prompt, tag_tokens in zip(*(column[items].tolist() for column in columns)):
        least = min(
            shortest,
            below.get((question, -1), max_tokens + 1),
            below.get((question, tag), max_tokens + 1),
        )
        if alone + least > max_tokens:
            count, shortest = count + 1, alone
            below[question, -1] = alone - prompt
            below[question, tag] = alone - prompt - tag_tokens
    return count
