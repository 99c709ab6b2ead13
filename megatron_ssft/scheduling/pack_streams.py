"""Packing parts of questions into token streams: few of them, or as many as asked for."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator

from megatron_ssft.scheduling.balance import halvings, split_heaviest
from megatron_ssft.scheduling.shared_nodes import OPEN_PARTS, ItemNodes, Part, question_parts


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
        shared = {nodes.tag[item]: nodes.tag_tokens[item] for item in part.items if nodes.tag[item] in present}
        return part.tokens - nodes.prompt_tokens[part.items[0]] - sum(shared.values())

    def add(self, part: Part) -> None:
        self.tokens += self.added_tokens(part)
        self.items += part.items
        if part.question in self.tags:
            self.tags[part.question].update(part.tags)
        else:
            self.tags[part.question] = set(part.tags)


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


def pack_evenly(
    items: Iterable[int], count: int, nodes: ItemNodes, max_tokens: int, one_question: bool
) -> list[list[int]]:
    """The items in `count` streams of about the same work, by LPT; [] where some stay empty or an item has no room."""
    streams = [_Stream() for _ in range(count)]
    work = [0] * count
    for item in sorted(items, key=lambda k: (-nodes.alone_work[k], k)):
        part, question, tag = Part(nodes, item), nodes.question[item], nodes.tag[item]
        best: tuple[int, int] | None = None
        for place, stream in enumerate(streams):
            after = work[place] + nodes.own_work[item]
            if question not in stream.tags:
                after += nodes.prompt_work[item]
            if tag not in stream.tags.get(question, ()):
                after += nodes.tag_work[item]
            if best is not None and (after, place) >= best:
                continue
            fits = stream.tokens + stream.added_tokens(part) <= max_tokens
            if not stream.items or (fits and (question in stream.tags or not one_question)):
                best = (after, place)
        if best is None:
            return []
        work[best[1]] = best[0]
        streams[best[1]].add(part)
    packed = [stream.items for stream in streams]
    return packed if all(packed) else []


def split_to(streams: list[list[int]], count: int, nodes: ItemNodes, smallest: int = 0) -> None:
    """Split streams of several items until there are `count`, in place; there have to be as many items.

    Streams of several questions come first, divided between questions, which costs nothing; then the heaviest.

    Args:
        smallest: no stream that comes of it has fewer tokens, so that there may be fewer streams than asked for.
    """
    split_heaviest(streams, count, *_way_to_split(nodes, smallest))


def splits(streams: list[list[int]], nodes: ItemNodes, smallest: int) -> Iterator[int]:
    """`split_to` one stream more at a time, as long as there are any to split; see `halvings`."""
    return halvings(streams, *_way_to_split(nodes, smallest))


def _way_to_split(
    nodes: ItemNodes, smallest: int
) -> tuple[Callable[[list[int]], tuple[bool, int]], Callable[[list[int]], tuple[list[int], list[int]] | None]]:
    def key(items: list[int]) -> tuple[bool, int]:
        return (len({nodes.question[item] for item in items}) == 1, -nodes.work(items))

    def halve(items: list[int]) -> tuple[list[int], list[int]] | None:
        halves = _halves(items, nodes)
        if halves is None or (smallest and min(map(nodes.tokens, halves)) < smallest):
            return None
        return halves

    return key, halve


def _halves(items: list[int], nodes: ItemNodes) -> tuple[list[int], list[int]] | None:
    """Two streams of about the same work: by questions if there are several, else by tags, else by items."""
    if len(items) == 1:
        return None
    blocks: dict[int, list[int]] = {}
    for names in (nodes.question, nodes.tag, range(len(nodes.question))):
        blocks = {}
        for item in items:
            blocks.setdefault(names[item], []).append(item)
        if len(blocks) > 1:
            break
    halves: tuple[list[int], list[int]] = ([], [])
    loads = [0, 0]
    for block in sorted(blocks.values(), key=lambda b: (-nodes.work(b), b[0])):
        side = 0 if (loads[0], len(halves[0])) <= (loads[1], len(halves[1])) else 1
        halves[side].extend(block)
        loads[side] += nodes.work(block)
    return halves
