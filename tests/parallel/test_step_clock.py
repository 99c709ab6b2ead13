"""Every moment of a step belongs to one part, whatever happens in it."""

from __future__ import annotations

import random

import pytest

from megatron_ssft.parallel.step_clock import PARTS, StepClock


class Time:
    """A clock that moves when it is told to, in nanoseconds."""

    def __init__(self):
        self.now = 5_000_000_000

    def __call__(self):
        return self.now

    def pass_seconds(self, seconds):
        self.now += round(1e9 * seconds)


def test_innermost_part_has_the_time():
    time = Time()
    clock = StepClock(time)
    time.pass_seconds(1)
    with clock.part("data"):
        time.pass_seconds(2)
        with clock.part("matching"):
            time.pass_seconds(4)
        time.pass_seconds(8)
        assert clock.current == "data"
    time.pass_seconds(16)
    assert clock.lap() == {**dict.fromkeys(PARTS, 0.0), "data": 10.0, "matching": 4.0, "other": 17.0}
    assert clock.lap() == dict.fromkeys(PARTS, 0.0)


def test_lap_inside_a_part_divides_it():
    time = Time()
    clock = StepClock(time)
    with clock.part("save"):
        time.pass_seconds(3)
        assert clock.lap()["save"] == 3.0
        time.pass_seconds(5)
    assert clock.lap()["save"] == 5.0


def test_part_ends_with_an_error():
    time = Time()
    clock = StepClock(time)
    with pytest.raises(KeyError), clock.part("data"):
        time.pass_seconds(3)
        raise KeyError
    time.pass_seconds(4)
    lap = clock.lap()
    assert (lap["data"], lap["other"]) == (3.0, 4.0)


@pytest.mark.parametrize("seed", range(20))
def test_parts_add_up_to_the_time_between_laps(seed):
    """By construction: random nesting, random durations, laps anywhere."""
    draw, time = random.Random(seed), Time()
    clock = StepClock(time)
    started, summed = time.now, 0.0

    def live(depth):
        nonlocal summed
        for _ in range(draw.randint(1, 4)):
            time.pass_seconds(draw.random())
            if draw.random() < 0.3:
                summed += sum(clock.lap().values())
            if depth:
                with clock.part(draw.choice([*PARTS, "matching"])):
                    live(depth - 1)

    live(4)
    summed += sum(clock.lap().values())
    assert summed == pytest.approx((time.now - started) / 1e9, abs=1e-6)
