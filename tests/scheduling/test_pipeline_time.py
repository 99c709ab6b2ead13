"""Time in a pipeline: the published formula for equal microbatches, a simulation of events, limits for all others."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest

from megatron_ssft.scheduling.pipeline_time import pipeline_time


@pytest.mark.parametrize("backward_ratio", [0, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_microbatches_have_the_published_idle_time(stages, backward_ratio):
    for count, chunks in itertools.product((1, 3, 8, 16, 40), (1, 2, 4)):
        if chunks > 1 and (stages == 1 or count % stages):
            continue
        busy = 5.0 * count * (1 + backward_ratio) / stages
        time, idle = pipeline_time([5.0] * count, stages, chunks, backward_ratio)
        assert time == pytest.approx(busy * (1 + (stages - 1) / (chunks * count)))
        assert idle == pytest.approx(1 - busy / time)


class EventSimulation:
    """The same schedule as events in time, by messages: a stage looks at its inbox, works, and sends on.

    Nothing is ordered beforehand: a stage decides by counts of what it has done, as the papers describe the schedule.
    Interleaved, it takes what comes next in groups of p microbatches.
    """

    def __init__(self, works, stages, chunks, ratio):
        self.works, self.stages, self.chunks, self.ratio = works, stages, chunks, ratio
        self.count = len(works) * chunks
        self.inbox = [{("F", mb, 0) for mb in range(len(works))} if s == 0 else set() for s in range(stages)]
        self.done = [{"F": 0, "B": 0} for _ in range(stages)]
        self.is_busy = [False] * stages

    def pass_of(self, number):
        """(microbatch, chunk) of a stage's forward pass with this number."""
        if self.chunks == 1:
            return number, 0
        group, rest = divmod(number, self.stages * self.chunks)
        chunk, place = divmod(rest, self.stages)
        return group * self.stages + place, chunk

    def next_task(self, stage):
        forward, backward = self.done[stage]["F"], self.done[stage]["B"]
        in_flight = self.stages - stage  # forward passes before the first backward pass
        if self.chunks > 1:
            in_flight = 2 * (self.stages - stage) - 1 + (self.chunks - 1) * self.stages
        if forward < self.count and (self.ratio == 0 or forward - backward < in_flight):
            return "F", *self.pass_of(forward)
        if self.ratio and backward < self.count:
            microbatch, chunk = self.pass_of(backward)
            return "B", microbatch, self.chunks - 1 - chunk
        return None

    def run(self):
        events, now = [], 0.0
        while True:
            for stage in range(self.stages):
                task = self.next_task(stage)
                if task is None or self.is_busy[stage] or task not in self.inbox[stage]:
                    continue
                self.is_busy[stage] = True
                work = self.works[task[1]] / (self.stages * self.chunks) * (1 if task[0] == "F" else self.ratio)
                heapq.heappush(events, (now + work, stage, task))
            if not events:
                return now
            now, stage, (kind, microbatch, chunk) = heapq.heappop(events)
            self.is_busy[stage] = False
            self.done[stage][kind] += 1
            step = 1 if kind == "F" else -1
            target, target_chunk = stage + step, chunk
            if target == self.stages:
                target, target_chunk = 0, chunk + 1
            elif target < 0:
                target, target_chunk = self.stages - 1, chunk - 1
            if target_chunk == self.chunks:  # through all layers: the loss
                self.inbox[stage].add(("B", microbatch, chunk))
            elif target_chunk >= 0:
                self.inbox[target].add((kind, microbatch, target_chunk))


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_unequal_microbatches_take_as_long_as_events_do(chunks):
    rng = np.random.default_rng(chunks)
    for _ in range(150):
        stages = int(rng.integers(1 + (chunks > 1), 7))
        count = int(rng.integers(1, 6)) * stages if chunks > 1 else int(rng.integers(1, 20))
        works = rng.lognormal(0, rng.choice([0.1, 0.6, 1.5]), count).tolist()
        ratio = float(rng.choice([0, 1, 2, 3]))
        expected = EventSimulation(works, stages, chunks, ratio).run()
        assert pipeline_time(works, stages, chunks, ratio).time == pytest.approx(expected)


def test_limits_that_every_pipeline_keeps():
    rng = np.random.default_rng(7)
    for _ in range(100):
        stages, chunks = int(rng.integers(2, 9)), int(rng.choice([1, 2]))
        works = rng.lognormal(0, 0.8, stages * int(rng.integers(1, 5))).tolist()
        ratio = float(rng.choice([2, 3]))
        time, idle = pipeline_time(works, stages, chunks, ratio)
        busy = sum(works) * (1 + ratio) / stages
        first_and_last = (stages - 1) / (stages * chunks) * (works[0] + ratio * works[-1])
        assert time >= busy and time >= max(works) * (1 + ratio)  # a stage's own work; the heaviest there and back
        assert time <= sum(works) * (1 + ratio)  # one task at a time
        assert chunks > 1 or time >= busy + first_and_last * (1 - 1e-12)
        assert idle == pytest.approx(1 - busy / time)
        assert pipeline_time([3 * work for work in works], stages, chunks, ratio).time == pytest.approx(3 * time)


def test_a_forward_pass_waits_for_the_heaviest_only():
    """A flow shop in which a job takes as long at every machine: sum + (p - 1) times the longest, in any order."""
    rng = np.random.default_rng(8)
    for stages, count in ((2, 5), (4, 3), (8, 20)):
        works = rng.lognormal(0, 1, count)
        time = pipeline_time(works.tolist(), stages, backward_ratio=0).time
        assert time == pytest.approx((works.sum() + (stages - 1) * works.max()) / stages)


def test_microbatches_without_work():
    assert pipeline_time([0.0, 0.0], 4) == (0, 0)
    assert pipeline_time([1.0, 2.0], 1, backward_ratio=3) == (12, 0)
    assert pipeline_time([0.0, 4.0], 2, backward_ratio=0) == (4, 0.5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (([], 2), "at least one"),
        (([1.0], 0), "1 or more"),
        (([1.0], 2, 0), "1 or more"),
        (([-1.0], 2), "finite"),
        (([float("nan")], 2), "finite"),
        (([1.0], 2, 1, float("inf")), "finite"),
        (([1.0] * 3, 2, 2), "multiple of 2"),
        (([1.0] * 3, 1, 2), "several stages"),
    ],
)
def test_what_no_pipeline_can_be_is_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline_time(*arguments)
