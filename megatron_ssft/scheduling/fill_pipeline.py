"""Filling a pipeline: more and lighter token streams than the budget asks for, where stages would wait for longer.

The time of a rank is that of its streams in the pipeline (`pipeline_time`): splitting a stream shortens what stages
wait while the pipeline fills and drains, and repeats a prompt or a tag. Both are known, so both are weighed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
"""Tasks (forward or backward of a microbatch in a stage) looked at for moves: some 30 ms."""


def fill_pipelines(ranks: Sequence[Streams], items: ItemNodes, limits: StreamLimits) -> list[Streams]:
    """The streams of each rank so that the rank that takes longest takes little time, its idle time included.

    First each rank splits its streams, questions from each other and then the heaviest stream, as long as that pays.
    Then the rank that takes longest gives streams or sequences to others, for nothing or for lighter ones, as long as
    that helps. Streams of fewer tokens than the smallest allowed do not come of it, nor PADs.

    Args:
        ranks: at least one stream on every rank. Counts may differ; where they must not, they stay what they are.
    """
    filled = [_Rank.of(streams, items, limits) for streams in ranks]
    if not limits.equal_counts:
        filled = [_split(rank, items, limits) for rank in filled]
    _even_out(filled, items, limits)
    return [rank.streams for rank in filled]


def slowest_time(ranks: Sequence[Streams], items: ItemNodes, limits: StreamLimits) -> float:
    """Time of the rank that takes longest, in units of work."""
    return max(_Rank.of(streams, items, limits).time for streams in ranks)


def enough_time(ranks: Sequence[Streams], items: ItemNodes, limits: StreamLimits) -> float:
    """A time of the rank that takes longest with which to be content: its work and next to no idle time."""
    return _NEAR * max(_Rank.of(streams, items, limits).busy(limits) for streams in ranks)


def count_small(ranks: Sequence[Streams], items: ItemNodes, smallest: int) -> int:
    """How many streams have fewer tokens than that."""
    return sum(items.tokens(stream) < smallest for streams in ranks for stream in streams)


class _Rank:
    """Streams with their works and the time that they take."""

    def __init__(self, streams: Streams, works: list[int], limits: StreamLimits) -> None:
        self.streams = streams
        self.works = works
        self.time = limits.pipeline.quick_time(works)

    @classmethod
    def of(cls, streams: Streams, items: ItemNodes, limits: StreamLimits) -> _Rank:
        return cls(streams, list(map(items.work, streams)), limits)

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
        trial = _Rank(list(streams), list(works), limits)
        if trial.time < best.time:
            best, misses = trial, 0
        else:
            misses += 1
        if best.time <= enough or trial.busy(limits) >= best.time or misses == _PATIENCE:
            break
    return best


class _Exchange(NamedTuple):
    """What two ranks have after an exchange, and the time of the one that then takes longer."""

    time: float
    own: _Rank
    partner: int
    other: _Rank


def _even_out(ranks: list[_Rank], items: ItemNodes, limits: StreamLimits) -> None:
    """Move streams and sequences from the rank that takes longest to others, in place, while that helps."""
    effort, pipeline = _EFFORT, limits.pipeline
    tasks = 2 * pipeline.stages * pipeline.chunks * (1 if pipeline.chunks == 1 else 3)  # for each stream
    for _ in range(_MOST_MOVES):
        by_time = sorted(range(len(ranks)), key=lambda r: (ranks[r].time, r))
        slow, best = by_time[-1], None
        limit = ranks[slow].time * _GAIN
        for partner in by_time[:-1][:_PARTNERS]:
            for own, other in _exchanges(ranks[slow], ranks[partner], items, limits):
                effort -= (len(own.works) + len(other.works)) * tasks
                time = max(own.time, other.time)
                if time < limit:
                    best, limit = _Exchange(time, own, partner, other), time
                if effort < 0:
                    break
        if best is None:
            return
        ranks[slow], ranks[best.partner] = best.own, best.other
        if not limits.equal_counts:
            for place in (slow, best.partner):
                ranks[place] = _split(ranks[place], items, limits)
        if effort < 0:
            return


def _exchanges(slow: _Rank, other: _Rank, items: ItemNodes, limits: StreamLimits) -> Iterator[tuple[_Rank, _Rank]]:
    """Both ranks after each exchange that is worth a look: a stream, or a sequence of several, for a stream or none."""
    pipeline = limits.pipeline
    spare = int((slow.time - other.time) * pipeline.stages / (1 + pipeline.backward_ratio))
    for place, stream in enumerate(slow.streams):
        streams, works = _without(slow, place)
        for taken in _returns(other, slow.works[place], spare, limits):
            own, theirs = (streams, works), (other.streams, other.works)
            if taken is not None:
                own = [*streams, other.streams[taken]], [*works, other.works[taken]]
                theirs = _without(other, taken)
            if own[0]:
                yield _Rank(*own, limits), _Rank([*theirs[0], stream], [*theirs[1], slow.works[place]], limits)
        if len(stream) == 1 or limits.equal_counts:
            continue
        for item in stream:
            rest = [k for k in stream if k != item]
            if min(items.alone_tokens[item], items.tokens(rest)) >= limits.smallest_stream:
                given = [*other.streams, [item]], [*other.works, items.alone_work[item]]
                yield _Rank([*streams, rest], [*works, items.work(rest)], limits), _Rank(*given, limits)


def _without(rank: _Rank, place: int) -> tuple[Streams, list[int]]:
    """Streams and works of the rank but for one."""
    return rank.streams[:place] + rank.streams[place + 1 :], rank.works[:place] + rank.works[place + 1 :]


def _returns(rank: _Rank, work: int, spare: int, limits: StreamLimits) -> list[int | None]:
    """Streams that the rank may give back for one of that work: none, and those that make both ranks about equal."""
    by_work = sorted(range(len(rank.works)), key=lambda k: (rank.works[k], k))
    after = bisect_left([rank.works[k] for k in by_work], work - spare // 2)
    near: list[int | None] = [k for k in by_work[max(0, after - 1) : after + 1] if rank.works[k] < work]
    return near if limits.equal_counts else [None, *near]
