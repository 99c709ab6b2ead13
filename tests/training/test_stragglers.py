"""Which rank is the slowest, and when one is called slow."""

from __future__ import annotations

from megatron_ssft.training.stragglers import STEPS, Seat, Stragglers

FOUR = [Seat("n1", 0), Seat("n1", 0), Seat("n2", 0), Seat("n2", 0)]
SLOW = [1.0, 1.1, 0.9, 2.0]


def lines(stragglers, steps):
    return [stragglers.look(step)[1] for step in steps]


def test_slowest_rank_and_its_host():
    slowest, line = Stragglers(FOUR).look(SLOW)
    assert (slowest.rank, slowest.host, slowest.seconds, slowest.median) == (3, "n2", 2.0, 1.0)
    assert line is None


def test_named_once_after_several_steps():
    said = lines(Stragglers(FOUR), [SLOW] * 20)
    assert said[: STEPS - 1] == [None] * (STEPS - 1) and said[STEPS:] == [None] * (20 - STEPS)
    line = said[STEPS - 1]
    assert line.startswith("slow: rank 3 on n2 ") and "now 2.00 s, median 1.00 s" in line and "\n" not in line


def test_one_fast_step_begins_the_count_anew():
    steps = ([SLOW] * (STEPS - 1) + [[1.0, 1.1, 0.9, 1.15]]) * 5
    assert not any(lines(Stragglers(FOUR), steps))


def test_another_rank_is_named_as_well():
    said = [line for line in lines(Stragglers(FOUR), [SLOW] * 10 + [[2.0, 1.0, 1.0, 2.0]] * 10) if line]
    assert len(said) == 2 and "rank 3 on n2" in said[0] and "rank 0 on n1" in said[1]


def test_a_slow_node_is_one_line():
    said = [line for line in lines(Stragglers(FOUR), [[1.0, 1.0, 2.0, 2.1]] * 10) if line]
    assert len(said) == 1 and "slow: ranks 2-3 on n2 " in said[0]


def test_two_ranks_are_enough():
    said = [line for line in lines(Stragglers(FOUR[:2]), [[1.0, 1.4]] * 10) if line]
    assert len(said) == 1 and "rank 1 on n1" in said[0]


def test_last_stage_of_a_pipeline_has_more_to_do():
    """The output head is on it; that is no fault of its ranks."""
    seats = [Seat("n1", stage) for stage in (0, 0, 1, 1)]
    stragglers = Stragglers(seats)
    assert not any(lines(stragglers, [[1.0, 1.0, 3.0, 3.1]] * 10))
    said = [line for line in lines(stragglers, [[1.0, 1.0, 3.0, 6.0]] * 10) if line]
    assert len(said) == 1 and "rank 3" in said[0] and "median 3.00 s" in said[0]


def test_tiny_steps_are_noise():
    assert not any(lines(Stragglers(FOUR), [[0.01, 0.01, 0.01, 0.05]] * 10))
    slowest, _ = Stragglers(FOUR).look([0.0, 0.0, 0.0, 0.0])
    assert slowest.seconds == 0.0
