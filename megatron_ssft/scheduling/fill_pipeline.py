"""Filling a pipeline: more and lighter token streams than the budget asks for, where stages would wait for longer.

The time of a rank is that of its streams in the pipeline (`pipeline_time`): splitting a stream shortens what stages
wait while the pipeline fills and drains, and repeats a prompt or a tag. Both are known, so both are weighed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from megatron_ssft.scheduling.limits import StreamLimits
from megatron_ssft.scheduling.pack_streams import splits
from megatron_ssft.scheduling.shared_nodes import ItemNodes

Streams = list[list[int]]
"""The items of each stream of a rank."""

_NEAR = 1.005
"""A rank that takes this much longer than without idle time is left as it is."""
_PATIENCE = 8
"""Numbers of streams tried after the best one so far."""
_LOOK_AT_ALL = 16
"""With more streams than this, not every number is tried, but one of so many."""
_MOST_MOVES = 32
_GAIN = 0.999
"""A move between ranks has to shorten the step to this share."""
_PARTNERS = 3
"""Of the ranks that are done first, these are looked at."""
_EFFORT = 200_000
"""Tasks (forward or backward of a microbatch in a stage) looked at for moves: some 20 ms."""


def fill_pipelines(ranks: Sequence[Streams], items: ItemNodes, limits: StreamLimits) -> list[Streams]:
    """The streams of each rank so that the rank that takes longest takes little time, its idle time included.

    First each rank splits its streams, questions from each other and then the heaviest stream, as long as that pays.
    Then the rank that takes longest gives streams or sequences to others, for nothing or for lighter ones, as long as
    that helps. Streams of fewer tokens than the smallest allowed do not come of it, nor PADs.

    Args:
        ranks: at least one stream on every rank. Counts may differ; where they must not, they stay what they are.
    """
    filled = [_Rank(streams, items, limits) for streams in ranks]
    if not limits.equal_counts:
        filled = [_split(rank, items, limits) for rank in filled]
    _even_out(filled, items, limits)
    return [rank.streams for rank in filled]


def slowest_time(ranks: Sequence[Streams], items: ItemNodes, limits: StreamLimits) -> float:
    """Time of the rank that takes longest, in units of work."""
    return max(_Rank(streams, items, limits).time for streams in ranks)


def count_small(ranks: Sequence[Streams], items: ItemNodes, smallest: int) -> int:
    """How many streams have fewer tokens than that."""
    return sum(items.tokens(stream) < smallest for streams in ranks for stream in streams)


class _Rank:
    """Streams with their works and the time that they take."""

    def __init__(
        self, streams: Streams, items: ItemNodes, limits: StreamLimits, works: list[int] | None = None
    ) -> None:
        self.streams = streams
        self.works = list(map(items.work, streams)) if works is None else works
        self.time = limits.pipeline.time_in_order(self.works)

    def busy(self, limits: StreamLimits) -> float:
        """Time in which a stage has work."""
        return sum(self.works) * (1 + limits.pipeline.backward_ratio) / limits.pipeline.stages


def _split(rank: _Rank, items: ItemNodes, limits: StreamLimits) -> _Rank:
    """The rank with as many streams as take it the least time."""
    best, misses = rank, 0
    enough = _NEAR * rank.busy(limits)
    streams, works = list(rank.streams), list(rank.works)
    look_at = len(streams) + 1
    if best.time <= enough:
        return best
    for place in splits(streams, items, limits.smallest_stream):
        works[place] = items.work(streams[place])
        works.append(items.work(streams[-1]))
        if len(streams) < look_at:
            continue
        look_at += 1 + len(streams) // _LOOK_AT_ALL
        trial = _Rank(list(streams), items, limits, list(works))
        if trial.time < best.time:
            best, misses = trial, 0
        else:
            misses += 1
        if best.time <= enough or trial.busy(limits) >= best.time or misses == _PATIENCE:
            break
    return best


def _even_out(ranks: list[_Rank], items: ItemNodes, limits: StreamLimits) -> None:
    """Move streams and sequences from the rank that takes longest to others, in place, while that helps."""
    pipeline = limits.pipeline
    effort = _EFFORT
    for _ in range(_MOST_MOVES):
        by_time = sorted(range(len(ranks)), key=lambda r: (ranks[r].time, r))
        slow = ranks[by_time[-1]]
        best = slow.time * _GAIN
        exchange: tuple[int, Streams, list[int], Streams, list[int]] | None = None
        for partner in by_time[:-1][:_PARTNERS]:
            other = ranks[partner]
            spare = int((slow.time - other.time) * pipeline.stages / (1 + pipeline.backward_ratio))
            for kept, given in _gifts(slow, items, limits):
                for taken in _returns(other, items.work(given), spare, limits):
                    back = [] if taken is None else [other.streams[taken]]
                    mine = [*kept, *back]
                    theirs = [stream for k, stream in enumerate(other.streams) if k != taken] + [given]
                    if not mine:
                        continue
                    works = list(map(items.work, mine)), list(map(items.work, theirs))
                    effort -= 2 * pipeline.stages * (len(mine) + len(theirs))
                    longest = max(map(pipeline.time_in_order, works))
                    if longest < best:
                        best, exchange = longest, (partner, mine, works[0], theirs, works[1])
            if effort < 0:
                break
        if exchange is None:
            return
        partner, mine, own_works, theirs, other_works = exchange
        for place, streams, works in ((by_time[-1], mine, own_works), (partner, theirs, other_works)):
            ranks[place] = _Rank(streams, items, limits, works)
            if not limits.equal_counts:
                ranks[place] = _split(ranks[place], items, limits)
        if effort < 0:
            return


def _gifts(rank: _Rank, items: ItemNodes, limits: StreamLimits) -> Iterator[tuple[Streams, list[int]]]:
    """(the streams without what is given, the stream that is given): each stream, each sequence of several."""
    for place, stream in enumerate(rank.streams):
        others = rank.streams[:place] + rank.streams[place + 1 :]
        yield others, stream
        if len(stream) == 1 or limits.equal_counts:
            continue
        for item in stream:
            rest = [k for k in stream if k != item]
            if min(items.alone_tokens[item], items.tokens(rest)) >= limits.smallest_stream:
                yield [*others, rest], [item]


def _returns(rank: _Rank, work: int, spare: int, limits: StreamLimits) -> list[int | None]:
    """Streams that the rank may give back for one of that work: none, and those that make both ranks about equal."""
    by_work = sorted(range(len(rank.works)), key=lambda k: (rank.works[k], k))
    after = bisect_left([rank.works[k] for k in by_work], work - spare // 2)
    near: list[int | None] = [k for k in by_work[max(0, after - 1) : after + 1] if rank.works[k] < work]
    return near if limits.equal_counts else [None, *near]
