"""Time of microbatches of unequal work in a pipeline: the order of megatron-core's schedules, step by step.

Narayanan et al. 2021 (arXiv 2104.04473, section 2.2) give the idle time of p stages with v model chunks each and m
equal microbatches: (p - 1) / (v m) of the time without any. `pipeline_time` gives the same there. Microbatches of
unequal work leave more stages waiting, and how much depends on their order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PipelineTime(NamedTuple):
    """How long a rank's pipeline takes for its microbatches."""

    time: float
    """Until the last stage is done, in the unit of the works: what one stage alone needs is the sum / stages."""
    idle_share: float
    """Share of the stages' time in which they wait, from 0 to below 1."""


def pipeline_time(
    forward_works: Sequence[float], stages: int, chunks: int = 1, backward_ratio: float = 2.0
) -> PipelineTime:
    """Time and idle share of one pass over the microbatches, in the order given.

    Every stage does its tasks (forward or backward of a microbatch in a model chunk) in the order in which
    megatron-core's schedule has them: 1F1B, or interleaved 1F1B with `chunks` > 1. A task starts once its stage is
    free and its input is there. Stages share a microbatch's work equally, so what embedding and head add to the first
    and the last stage is spread. Sending takes no time and blocks nobody. (Where a send lasts until the receiver takes
    it, 1F1B takes as long for works that rise and then fall, and up to about 1% longer for random ones.)

    Args:
        forward_works: work of each microbatch's forward pass through all stages, in any unit; 0 or more.
        stages: p, pipeline stages.
        chunks: v, model chunks of a stage (virtual pipeline); 1: none.
        backward_ratio: work of the backward over that of the forward pass: 2, or 3 where everything is recomputed;
            0: a forward pass alone, such as the cost pass.

    Raises:
        ValueError: no microbatch, a number out of range, or a number of microbatches that is no multiple of the
            stages where the schedule is interleaved.
    """
    count = len(forward_works)
    if not count:
        raise ValueError("a pipeline needs at least one microbatch")
    if stages < 1 or chunks < 1:
        raise ValueError(f"stages and chunks have to be 1 or more, not {stages} and {chunks}")
    if not all(0 <= number < math.inf for number in (backward_ratio, *forward_works)):
        raise ValueError("works and the ratio of backward to forward have to be finite and 0 or more")
    if chunks > 1 and (stages == 1 or count % stages):
        raise ValueError(f"interleaved chunks need several stages and a multiple of {stages} microbatches, not {count}")
    time = _walk(forward_works, stages, chunks, backward_ratio)
    busy = math.fsum(forward_works) * (1 + backward_ratio) / stages
    return PipelineTime(time, max(0.0, 1 - busy / time) if time else 0.0)


@dataclass(frozen=True)
class Pipeline:
    """The pipeline that a data-parallel rank's microbatches go through; by default none, one stage."""

    stages: int = 1
    chunks: int = 1
    """Model chunks of a stage; more than 1: the interleaved schedule."""
    backward_ratio: float = 2.0
    """Work of the backward over that of the forward pass; 0: forward passes alone."""

    def time(self, works: Sequence[float]) -> float:
        """`pipeline_time` of works that are known to be valid."""
        if self.stages == 1:
            return math.fsum(works) * (1 + self.backward_ratio)
        return _walk(works, self.stages, self.chunks, self.backward_ratio)

    def order(self, works: Sequence[float]) -> list[int]:
        """Positions in `works` in the order that takes least time of those that are tried.

        Heaviest first, lightest first, and orders that rise and then fall: while a pipeline fills and drains most
        stages wait for its first and its last microbatch, so these had better be light; and neighbours that are alike
        do not wait for each other in between. Of equal times the order named first wins. One stage, or forward passes
        alone that are not interleaved: heaviest first, as no order takes longer.
        """
        falling = sorted(range(len(works)), key=lambda k: (-works[k], k))
        if self.stages == 1 or len(works) < 2 or (self.backward_ratio == 0 and self.chunks == 1):
            return falling
        best, least = falling, self.time([works[k] for k in falling]) * (1 - _ROUNDING)
        for order in _rise_and_fall(falling[::-1]):
            time = self.time([works[k] for k in order])
            if time < least:
                best, least = order, time * (1 - _ROUNDING)
        return best

    def quick_time(self, works: Sequence[float]) -> float:
        """Time of the works in a good order, mostly within 1% of that of `order`'s: tells which works take longer.

        1F1B: rising with every other one, then falling. Interleaved: the best of falling, rising, and rising with
        every third one, then falling.
        """
        rising = sorted(works)
        if self.chunks == 1:
            return self.time(rising[1::2] + rising[::2][::-1])
        peaked = rising[::3] + [work for place, work in enumerate(rising) if place % 3][::-1]
        return min(map(self.time, (rising[::-1], rising, peaked)))


_ROUNDING = 1e-9
"""Times that differ by less are the same."""
_RISING_SHARES = (2, 3, 4)
"""One of so many microbatches stands where the work rises, or where it falls."""


def _rise_and_fall(rising: list[int]) -> Iterator[list[int]]:
    """Orders that rise, fall, or rise and then fall; `rising`: lightest first."""
    yield rising
    for step in _RISING_SHARES:
        few = rising[::step]
        others = [item for place, item in enumerate(rising) if place % step]
        yield few + others[::-1]
        yield others + few[::-1]


def _walk(works: Sequence[float], stages: int, chunks: int, backward_ratio: float) -> float:
    """When the last stage is done: the longest way through the tasks."""
    forward = [work / (stages * chunks) for work in works]
    costs = forward + [work * backward_ratio for work in forward]
    free = [0.0] * stages
    ends: list[float] = []
    few = len(works) * stages * chunks <= _KEPT
    for stage, cost, needed in (_kept_tasks if few else _tasks)(len(works), stages, chunks, backward_ratio == 0):
        start = free[stage]
        if needed >= 0 and ends[needed] > start:
            start = ends[needed]
        start += costs[cost]
        free[stage] = start
        ends.append(start)
    return max(free)


Task = tuple[int, int, int]
"""(stage, microbatch or, for its backward, microbatch + their number, position of the task whose result it needs)"""


def _tasks(count: int, stages: int, chunks: int, forward_only: bool) -> tuple[Task, ...]:
    """All tasks of all stages, each after those it waits for; no task needed: -1."""
    queues = [iter(_stage_order(count, stages, chunks, stage, forward_only)) for stage in range(stages)]
    heads = [next(queue, None) for queue in queues]
    last = stages * chunks - 1
    position: dict[tuple[int, int, bool], int] = {}  # (microbatch, chunk among those of all stages, backward)
    tasks: list[Task] = []
    while any(head is not None for head in heads):
        before = len(tasks)
        for stage, queue in enumerate(queues):
            while (head := heads[stage]) is not None:
                microbatch, chunk, is_backward = head
                layer = chunk * stages + stage
                if not is_backward:
                    source = (microbatch, layer - 1, False) if layer else None
                else:
                    source = (microbatch, layer + 1, True) if layer < last else (microbatch, layer, False)
                if source is not None and source not in position:
                    break
                position[microbatch, layer, is_backward] = len(tasks)
                tasks.append((stage, microbatch + count * is_backward, -1 if source is None else position[source]))
                heads[stage] = next(queue, None)
        assert len(tasks) > before, "the schedule waits for itself"
    return tuple(tasks)


_KEPT = 4096
"""The order of at most so many forward passes is kept for the next call."""
_kept_tasks = functools.lru_cache(maxsize=128)(_tasks)


def _stage_order(count: int, stages: int, chunks: int, stage: int, forward_only: bool) -> list[tuple[int, int, bool]]:
    """(microbatch, chunk of the stage, whether backward) in the order in which a stage runs them.

    After a warm-up of forward passes a stage runs a forward and a backward pass in turn. The interleaved schedule takes
    groups of as many microbatches as there are stages through its chunks, one chunk after the other, and warms up
    longer. Backward passes come in the order of the forward ones, with the chunks reversed.
    """
    group = stages if chunks > 1 else count
    table = [
        (microbatch, chunk)
        for first in range(0, count, group)
        for chunk in range(chunks)
        for microbatch in range(first, min(first + group, count))
    ]
    forward = [(microbatch, chunk, False) for microbatch, chunk in table]
    if forward_only:
        return forward
    backward = [(microbatch, chunks - 1 - chunk, True) for microbatch, chunk in table]
    ahead = (stages - stage - 1) * (2 if chunks > 1 else 1) + (chunks - 1) * group
    ahead = min(ahead, len(table))
    paired = [task for pair in zip(forward[ahead:], backward) for task in pair]
    return forward[:ahead] + paired + backward[len(table) - ahead :]
