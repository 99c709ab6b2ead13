"""The collapse alarm: gaps against brute force, information without its bias, warnings once and again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.matching.assignment import solve_assignment
from megatron_ssft.matching.collapse import (
    PATIENCE,
    CollapseWatch,
)
from megatron_ssft.records import Assignment
from tests.helpers.timing import yardsticks

SOURCES = ["a", "b", "c", "d"]


def assigned(cost):
    return Assignment(solve_assignment(cost, seed=0), cost)


class Steps:
    """Makes steps of a run with 4 tags and feeds them to a watch."""

    def __init__(self, questions=30, seed=0, **options):
        self.rng = np.random.default_rng(seed)
        self.questions = questions
        self.watch = CollapseWatch(4, **({"window": 5} | options))

    def __call__(self, kind="good", cost=None, sources=True, times=1):
        lines = []
        for _ in range(times):
            data = [self._question(kind, cost) for _ in range(self.questions)]
            names = [n if sources else [None] * len(n) for _, n in data]
            lines += self.watch.update([a for a, _ in data], names)
        return lines

    def _question(self, kind, cost):
        order = self.rng.permutation(4)[:3]
        names = [SOURCES[k] for k in order]
        if kind == "good":
            tags = order
        elif kind == "random":
            tags = self.rng.permutation(4)[:3]
        else:  # the tags that are left, by source or not
            tags = self.rng.permutation([t for t in range(4) if t not in kind])[:2]
            names = [SOURCES[t] for t in tags]
        matrix = None
        if cost is not None:
            matrix = np.ones((4, len(tags))) * 2.0 + cost * self.rng.random((4, len(tags)))
            matrix[tags, range(len(tags))] = 2.0
        return Assignment(tuple(int(t) for t in tags), matrix), names


def test_a_healthy_run_is_silent():
    steps = Steps()
    assert steps(cost=1.0, times=50) == []
    assert steps.watch.figures["tag_source_information"] > 0.99
    assert steps.watch.figures["unmatched_tags"] == 0
    assert 0.01 < steps.watch.figures["matching_margin"] < 1
    assert steps(cost=None) == [] and steps.watch.figures["matching_margin"] is None


def test_a_vanishing_gap_is_told_once_until_it_has_passed():
    steps = Steps()
    assert steps(cost=1e-6, times=4) == []
    (line,) = steps(cost=1e-6)
    assert line.startswith("warning: for 5 steps optimal matching has been within 0.0001 nats of a random one")
    assert "--matching-tokens" in line and "\n" not in line
    assert steps(cost=1e-6, times=20) == []
    assert steps(cost=1.0) == []
    assert steps(cost=1e-6, times=4) == []
    assert steps(cost=1e-6, times=4) == [line]


def test_steps_without_costs_neither_count_nor_break_the_row():
    steps = Steps()
    assert steps(cost=1e-6, times=4) + steps(cost=None, times=30) == []
    assert len(steps(cost=1e-6)) == 1


def clones(steps, times, exact):
    """Tags 2 and 3 cost the same but for `exact`; sources are as informative as they can be."""
    lines = []
    for _ in range(times):
        given = []
        for _ in range(20):
            cost = steps.rng.random((4, 3))
            cost[3] = cost[2] + exact * steps.rng.random(3)
            given.append(assigned(cost))
        lines += steps.watch.update(given, [[SOURCES[t] for t in a.tags] for a in given])
    return lines


def test_tags_that_are_copies_of_each_other_are_told():
    steps = Steps()
    assert clones(steps, 4, 1e-4) == []
    (line,) = clones(steps, 20, 1e-4)
    assert "second-best" in line and line.startswith("warning: for 5 steps")
    assert clones(steps, 20, 1e-4) == []
    assert clones(steps, 1, 1.0) == []
    assert clones(steps, 5, 1e-4) == [line]
    assert clones(Steps(), 30, 1.0) == []


def test_tags_that_are_all_the_same_are_told_once():
    (line,) = Steps()(cost=0.0, times=20)
    assert "of a random one" in line


def test_nothing_learned_about_the_sources_is_told_after_some_patience():
    steps = Steps()
    assert steps("random", cost=1.0, times=PATIENCE - 1) == []
    (line,) = steps("random", cost=1.0)
    assert "still say nothing about the source of a trace after 100 steps" in line
    assert steps("random", cost=1.0, times=50) == []
    assert steps.watch.figures["tag_source_information"] < 0.05


def test_losing_what_was_learned_is_told_as_soon_as_it_shows():
    steps = Steps()
    steps("good", times=10)
    lines = steps("random", times=6)
    assert len(lines) == 1 and "no longer say anything about the source" in lines[0]
    assert steps("good", times=6) == []
    assert len(steps("random", times=6)) == 1


def test_slots_in_no_order_are_no_reason_to_worry_but_their_loss_is():
    steps = Steps()
    assert steps("random", sources=False, times=PATIENCE + 50) == []
    in_order = [(Assignment((0, 1, 2, 3)), [None] * 4)] * 30
    for _ in range(6):
        assert steps.watch.update(*zip(*in_order)) == []
    lines = steps("random", sources=False, times=6)
    assert len(lines) == 1 and "no longer say anything about the slot" in lines[0]


def test_tags_that_are_never_matched_are_told_by_name():
    steps = Steps()
    assert steps({1}, times=4) == []
    lines = steps({1})
    assert len(lines) == 1
    assert "matched to <think2> in the last 5 steps" in lines[0] and steps.watch.figures["unmatched_tags"] == 1
    assert steps({1}, times=30) == []
    (line,) = steps({1, 3}, times=5)
    assert "<think2>, <think4> " in line
    assert steps("good", times=5) == []
    assert len(steps({1}, times=5)) == 1


def test_a_single_match_does_not_start_it_all_over():
    steps = Steps()
    assert len(steps({1}, times=5)) == 1
    rare = [Assignment((1,))], [["b"]]
    for _ in range(4):
        assert steps({1}, times=7) + steps.watch.update(*rare) == []


def test_small_windows_may_leave_a_tag_out_by_chance():
    assert Steps(questions=2)({1}, times=20) == []


def test_other_matchings_than_optimal():
    random = Steps(mode="random")
    assert random("random", cost=1.0, times=PATIENCE + 10) == [] and random.watch.figures["matching_margin"] is None
    assert len(Steps(mode="random")("random", cost=1e-6, times=20)) == 1
    assert Steps(mode="fixed")({1}, cost=1.0, times=20) == []
    single = Steps(mode="single")
    assert single.watch.update([Assignment((0, 0, 0))], [["a", "b", "c"]]) == [] and single.watch.figures == {}


SCRIPT = [
    ("good", 1.0, True), ("random", 1e-6, True), ("good", None, True), ({1}, 1e-6, True), ("random", 1.0, False),
    ({1, 3}, 1e-6, True), ("good", 1e-6, True), ("random", 1.0, False),
]  # fmt: skip


def scripted():
    """Steps that set off every warning."""
    steps = Steps()
    recorded = []
    steps.watch = type("Recorder", (), {"update": lambda self, *step: recorded.append(step) or []})()
    for kind, cost, sources in SCRIPT:
        steps(kind, cost=cost, sources=sources, times=10)
        if kind == "random":
            clones(steps, 10, 1e-4)
    return recorded


def test_a_resumed_watch_goes_on_as_if_nothing_had_happened():
    data = scripted()
    watch, states, whole = CollapseWatch(4, 8), [], []
    for step in data:
        states.append(json.dumps(watch.state_dict(), allow_nan=False))
        whole.append((watch.update(*step), watch.figures))
    told = " ".join(line for lines, _ in whole for line in lines)
    assert all(t in told for t in ("random one", "second-best", "the source", "<think2> in", "<think2>, <think4> in"))
    resumed = CollapseWatch(4, 8)
    for cut in range(0, len(states), 3):
        resumed.load_state_dict(json.loads(states[cut]))  # in place of what it saw in the round before
        part = data[cut : cut + 12]
        assert [(resumed.update(*step), resumed.figures) for step in part] == whole[cut : cut + 12]
        if cut + 12 < len(states):
            assert json.dumps(resumed.state_dict()) == states[cut + 12]


def test_a_shorter_window_after_a_resume():
    first, second = CollapseWatch(4, 5), CollapseWatch(4, 3)
    data = scripted()[:20]
    for step in data[:12]:
        first.update(*step)
        second.update(*step)
    resumed = CollapseWatch(4, 3)
    resumed.load_state_dict(first.state_dict())
    for step in data[12:]:
        resumed.update(*step)
        second.update(*step)
        assert resumed.figures == second.figures


@pytest.mark.parametrize(
    "damage",
    [
        None,
        {},
        {"window": [[[[0, 1]], [["a"]]]]},
        {"window": [[[[0]], [["a", "b"]]]]},
        {"window": [[[[0, 4]], [["a", "b"]]]]},
        {"window": [[[[0, -1]], [["a", "b"]]]]},
        {"window": [[[[0]]]]},
        {"window": [[]]},
        {"window": 3},
        {"steps": None},
        {"gaps": ["x"]},
        {"told": 3},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    watch = CollapseWatch(4, 5)
    for step in scripted()[:8]:
        watch.update(*step)
    before = watch.state_dict()
    with pytest.raises(UserError, match="collapse alarm is damaged") as error:
        watch.load_state_dict({**before, **damage} if damage else damage)
    assert "\n" not in str(error.value)
    assert watch.state_dict() == before


def test_margins_that_do_not_exist_can_be_stored():
    watch = CollapseWatch(1, 5)
    watch.update([Assignment((0,), np.ones((1, 1)))], [["a"]])
    assert watch.figures["matching_margin"] is None
    json.dumps(watch.state_dict(), allow_nan=False)


def test_a_step_takes_well_under_a_millisecond():
    rng = np.random.default_rng(0)
    costs = [rng.random((6, 4)) for _ in range(32)]
    step = [assigned(c) for c in costs], [[f"teacher {k}" for k in rng.permutation(8)[:4]] for _ in costs]
    watch = CollapseWatch(6)
    _, cost = yardsticks(lambda: [watch.update(*step) for _ in range(60)], limit=10)
    assert cost < 10  # 4.7 when it was written: .5 ms a step
