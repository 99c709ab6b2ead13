"""When a rank counts as lost or stuck: never while it moves, always after its limit, and by the right name."""

from __future__ import annotations

import msgspec
import pytest

from megatron_ssft.parallel.watch.judgement import Judge, Limits, Place, described, ranks_text
from megatron_ssft.parallel.watch.watch import Watch, beat_seconds

LIMITS = Limits(silence=10.0, slow=100.0, beat=1.0)


def place(**changes):
    return msgspec.structs.replace(Place(host="node", pid=7, step=3, phase="training", is_slow=False), **changes)


def judge(seconds, ranks, step=1.0):
    """The first verdict and when, where `ranks(t)` gives the places and whether the store answered."""
    judge, rounds, elapsed = Judge(LIMITS, "the store at a:1"), 0, 0.0
    while elapsed < seconds:
        places, answered = ranks(elapsed)
        rounds += answered
        verdict = judge.look(places, rounds, step)
        if verdict is not None:
            return verdict, elapsed
        elapsed += step
    return None, elapsed


def alive(t, **changes):
    return place(beat=int(t), moves=int(t), **changes)


def test_ranks_that_move_are_left_alone():
    assert judge(500, lambda t: ({0: alive(t), 1: alive(t)}, True))[0] is None


def test_a_silent_rank_is_lost_after_the_limit_whatever_it_does():
    for slow in (False, True):
        silent = place(beat=4, moves=4, is_slow=slow, phase="saving")
        verdict, at = judge(500, lambda t, silent=silent: ({0: alive(t), 1: silent, 2: alive(t)}, True))
        assert 10 <= at <= 13
        assert "rank 1 (process 7 on node), last seen at step 3, saving" in verdict
        assert "rank 0" not in verdict and "rank 2" not in verdict


def test_slow_work_has_its_own_limit():
    def ranks(t):
        slow = place(beat=int(t), moves=1, is_slow=True, phase="starting")
        return {0: slow, 1: msgspec.structs.replace(slow, is_waiting=True)}, True

    verdict, at = judge(500, ranks)
    assert 100 <= at <= 103 and "--slow-work-timeout-minutes" in verdict
    assert "rank 0 (process" in verdict and "rank 1" not in verdict


def test_whoever_waits_is_not_to_blame():
    def ranks(t):
        waiting = place(beat=int(t), moves=1, is_waiting=True, phase="between steps")
        return {0: waiting, 1: waiting, 2: place(beat=int(t), moves=2, phase="writing the log")}, True

    verdict, at = judge(500, ranks)
    assert 10 <= at <= 13 and "rank 2 (process 7 on node), last seen at step 3, writing the log" in verdict
    assert "rank 0" not in verdict and "ranks 0" not in verdict


def test_where_all_wait_all_are_named_by_place():
    def ranks(t):
        a, b = (place(beat=int(t), moves=1, is_waiting=True, phase=phase) for phase in ("saving", "between steps"))
        return {0: a, 1: b, 2: b, 3: b}, True

    verdict, _ = judge(500, ranks)
    assert "rank 0 (process 7 on node), last seen at step 3, saving, waiting" in verdict
    assert "ranks 1-3, last seen at step 3, between steps, waiting" in verdict


def test_a_store_that_does_not_answer_is_not_held_against_the_others():
    def ranks(t):
        first = place(beat=min(int(t), 20), moves=min(int(t), 20), phase="writing the log")
        return {0: first, 1: alive(t)}, t < 20

    verdict, at = judge(500, ranks)
    assert 29 <= at <= 32 and "rank 0 (process 7 on node), last seen at step 3, writing the log" in verdict
    assert "the store at a:1" in verdict


def test_who_has_left_is_not_waited_for():
    assert judge(500, lambda t: ({0: alive(t), 1: place(has_left=True)}, True))[0] is None


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([4, 2], "ranks 2, 4"), ([1, 2], "ranks 1-2")]
)
def test_ranks_in_words(ranks, text):
    assert ranks_text(ranks) == text


def test_messages_stay_short():
    places = {rank: place(step=rank + 1) for rank in range(1000)}
    assert len(described(places)) < 1000 and "and 992 more" in described(places)


def test_a_phase_ends_but_not_where_an_error_passes():
    watch = Watch()
    with watch.phase("saving", slow=True):
        assert (watch._place.phase, watch._place.is_slow) == ("saving", True)
    assert watch._place.phase == "starting"
    with pytest.raises(ValueError), watch.phase("training"):
        raise ValueError
    assert watch._place.phase == "training"


def test_signs_of_life_are_frequent_enough_and_not_too_frequent():
    for silence in (3.0, 60.0, 1800.0, 1e6):
        assert silence / beat_seconds(silence) >= 20
    assert beat_seconds(1800.0) == 5.0
