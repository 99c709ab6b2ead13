"""Whether sequences fit into so many token streams: answered for certain by branch and bound, within a limited effort.

Asked only where the number of PADs depends on it: when all but a few sequences need a stream of their own. The few
that may share one leave little to try, so that hundreds of steps mostly settle what no heuristic can.
"""

from __future__ import annotations

from collections import Counter

from megatron_ssft.scheduling.shared_nodes import ItemNodes

_MOST_ITEMS = 256
"""The search goes as deep as there are items."""


def fit_into(
    nodes: ItemNodes, count: int, max_tokens: int, one_question: bool, effort: int
) -> tuple[list[list[int]] | None, bool]:
    """(the items in at most `count` streams or None, whether it is certain).

    A stream has at most `max_tokens` tokens or is one item. None is certain where every way was ruled out, and
    uncertain where the search gave up after looking at `effort` streams.
    """
    if not one_question:
        return _search(nodes, list(range(len(nodes.question))), count, max_tokens, effort)
    groups: dict[int, list[int]] = {}
    for item, question in enumerate(nodes.question):
        groups.setdefault(question, []).append(item)
    streams: list[list[int]] = []
    for items in groups.values():
        for number in range(1, len(items) + 1):
            packing, certain = _search(nodes, items, number, max_tokens, effort)
            if not certain:
                return None, False
            if packing is not None:
                streams += packing
                break
    return (streams if len(streams) <= count else None), True


def _search(
    nodes: ItemNodes, items: list[int], count: int, max_tokens: int, effort: int
) -> tuple[list[list[int]] | None, bool]:
    """`fit_into` for some of the items, in streams that may hold several questions."""
    longer = [[item] for item in items if nodes.alone_tokens[item] > max_tokens]
    items = [item for item in items if nodes.alone_tokens[item] <= max_tokens]
    if len(longer) > count:
        return None, True
    if len(items) > _MOST_ITEMS:
        return None, False
    search = _Search(nodes, items, count - len(longer), max_tokens, effort)
    fits = search.place(0)
    return ([*longer, *(stream.items for stream in search.streams)] if fits else None), fits is not None


class _Stream:
    """A stream in the making, from which the last item can be taken back."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.tokens = 0
        self.share = 0
        self.tags: Counter[tuple[int, int]] = Counter()  # items of a (question, tag); never 0
        self.questions: Counter[int] = Counter()


class _Search:
    """Depth-first: the longest item left goes into each of the streams in turn, the fullest first, or into a new one.

    A branch ends when the tokens that have to be somewhere are more than the streams that still take anything can
    hold. Each item counts with its own tokens and a share of prompt and tag, 1 / k if at most k of its question fit
    into a stream: what is in a stream adds up to no more than its tokens.
    """

    def __init__(self, nodes: ItemNodes, items: list[int], count: int, max_tokens: int, effort: int) -> None:
        self.nodes, self.count, self.max_tokens = nodes, count, max_tokens
        self.items = sorted(items, key=lambda item: (-nodes.alone_tokens[item], nodes.question[item], item))
        self.streams: list[_Stream] = []
        self.effort = effort
        self.sharing = any(nodes.prompt_tokens[item] + nodes.tag_tokens[item] for item in items)
        groups: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}  # where the last item of a question stands
        for place, item in enumerate(self.items):
            groups.setdefault(nodes.question[item], []).append(item)
            self.last[nodes.question[item]] = place
        self.least_own = {q: min(nodes.own_tokens[item] for item in group) for q, group in groups.items()}
        self.share: dict[int, int] = {}
        for group in groups.values():
            most = self._most_together(group)
            for item in group:
                node = nodes.prompt_tokens[item] + nodes.tag_tokens[item]
                self.share[item] = nodes.own_tokens[item] + node // most
        self.total = sum(self.share.values())

    def _most_together(self, group: list[int]) -> int:
        tokens, most = self.nodes.prompt_tokens[group[0]], 0
        for own in sorted(self.nodes.own_tokens[item] for item in group):
            tokens += own
            most += tokens <= self.max_tokens
        return max(1, most)

    def place(self, place: int) -> bool | None:
        """Whether the items from `place` on can be placed; None: it took too long."""
        if place == len(self.items):
            return True
        self.effort -= len(self.streams) + 1
        if self.effort < 0:
            return None
        if self._too_much(place):
            return False
        item = self.items[place]
        for stream in self._choices(item):
            answer = self._try(stream, item, place)
            if answer is not False:
                return answer
        if len(self.streams) >= self.count:
            return False
        self.streams.append(_Stream())
        answer = self._try(self.streams[-1], item, place)
        if answer is False:
            self.streams.pop()
        return answer

    def _too_much(self, place: int) -> bool:
        shortest = self.nodes.alone_tokens[self.items[-1]]
        closed = share = 0
        for stream in self.streams:
            room = self.max_tokens - stream.tokens
            if room < shortest and all(self.last[q] < place or room < self.least_own[q] for q in stream.questions):
                closed += 1
                share += stream.share
        return self.total - share > self.max_tokens * (self.count - closed)

    def _added_tokens(self, stream: _Stream, item: int) -> int:
        nodes, question = self.nodes, self.nodes.question[item]
        if question not in stream.questions:
            return nodes.alone_tokens[item]
        present = (question, nodes.tag[item]) in stream.tags
        return nodes.own_tokens[item] + (0 if present else nodes.tag_tokens[item])

    def _choices(self, item: int) -> list[_Stream]:
        """Streams with room, of several alike one: first those where the prompt stands already, then the fullest."""
        choices: dict[tuple[bool, int, frozenset[tuple[int, int]] | None], _Stream] = {}
        for stream in self.streams:
            added = self._added_tokens(stream, item)
            room = self.max_tokens - stream.tokens - added
            if room >= 0:
                content = frozenset(stream.tags) if self.sharing else None
                choices.setdefault((added == self.nodes.alone_tokens[item], room, content), stream)
        return [choices[key] for key in sorted(choices, key=lambda key: key[:2])]

    def _try(self, stream: _Stream, item: int, place: int) -> bool | None:
        question, tag = self.nodes.question[item], self.nodes.tag[item]
        added = self._added_tokens(stream, item)
        stream.items.append(item)
        stream.tokens += added
        stream.share += self.share[item]
        stream.tags[question, tag] += 1
        stream.questions[question] += 1
        answer = self.place(place + 1)
        if answer is not True:
            stream.items.pop()
            stream.tokens -= added
            stream.share -= self.share[item]
            stream.tags[question, tag] -= 1
            stream.questions[question] -= 1
            if not stream.tags[question, tag]:
                del stream.tags[question, tag]
            if not stream.questions[question]:
                del stream.questions[question]
        return answer
