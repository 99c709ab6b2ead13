"""The collapse alarm: gaps against brute force, information without its bias, warnings once and again."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.matching.approximation import second_best_margin
from megatron_ssft.matching.assignment import assignment_gap, solve_assignment
from megatron_ssft.matching.collapse import (
    MAX_CELLS,
    PATIENCE,
    CollapseWatch,
    TagSourceInformation,
)
from megatron_ssft.matching.margins import matching_gaps, relative_margins
from megatron_ssft.records import Assignment
from megatron_ssft.report.read.runs import mutual_information_bits

# -- gaps --------------------------------------------------------------------------------------------------------


def brute_force(cost):
    """Mean minus least and second-least minus least over all injections of M traces into N tags."""
    n, m = cost.shape
    totals = sorted(math.fsum(cost[i, j] for j, i in enumerate(tags)) for tags in itertools.permutations(range(n), m))
    return np.mean(totals) - totals[0], totals[1] - totals[0] if len(totals) > 1 else math.inf


def assigned(cost):
    return Assignment(solve_assignment(cost, seed=0), cost)


def random_costs(rng, num_tags, questions=12):
    return [rng.normal(size=(num_tags, rng.integers(1, num_tags + 1))) for _ in range(questions)]


@pytest.mark.parametrize("num_tags", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", ["real", "ties", "far from 0", "tiny", "copies"])
def test_gaps_and_margins_by_brute_force(num_tags, kind):
    rng = np.random.default_rng(num_tags)
    costs = random_costs(rng, num_tags)
    if kind == "ties":
        costs = [np.round(c) for c in costs]
    if kind == "far from 0":
        costs = [c + 1000 * rng.random(c.shape[1]) for c in costs]
    if kind == "tiny":
        costs = [1e-9 * c for c in costs]
    if kind == "copies":  # all assignments of as many traces as tags cost the same, but for rounding
        costs = [np.repeat(rng.random((num_tags, 1)), num_tags, axis=1) for _ in range(30)]
    expected = np.array([brute_force(c) for c in costs]).T
    scale = max(np.abs(c).max() for c in costs)
    for found, right in zip(matching_gaps([assigned(c) for c in costs]), expected):
        assert found.dtype == np.float64 and (found >= 0).all()
        np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-11 * scale)
    for cost, gap, margin in zip(costs, *matching_gaps([assigned(c) for c in costs])):
        assert gap == pytest.approx(assignment_gap(cost), rel=1e-9, abs=1e-11 * scale)
        assert margin == pytest.approx(second_best_margin(cost), rel=1e-9, abs=1e-11 * scale)


def test_tags_that_are_not_optimal_are_measured_all_the_same():
    rng = np.random.default_rng(0)
    costs = random_costs(rng, 5, questions=40)
    given = [Assignment(tuple(rng.permutation(5)[: c.shape[1]].tolist()), c) for c in costs]
    for found, right in zip(matching_gaps(given), matching_gaps([assigned(c) for c in costs])):
        np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-12)


def test_the_order_of_traces_does_not_change_the_gaps():
    rng = np.random.default_rng(1)
    costs = random_costs(rng, 5)
    orders = [rng.permutation(c.shape[1]) for c in costs]
    one = matching_gaps([assigned(c) for c in costs])
    other = matching_gaps([assigned(c[:, o]) for c, o in zip(costs, orders)])
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("num_tags", "num_traces"), [(6, 4), (6, 6), (6, 1), (16, 4), (16, 12), (64, 4)])
def test_margins_are_about_what_the_gap_lets_expect(num_tags, num_traces):
    rng = np.random.default_rng(0)
    costs = [rng.random((num_tags, num_traces)) for _ in range(100)]
    gaps, margins = matching_gaps([assigned(c) for c in costs])
    relative = relative_margins(gaps, margins, np.full(100, num_traces), num_tags)
    assert 0.2 < np.median(relative) < 30


# -- mutual information --------------------------------------------------------------------------------------------


def value(questions, num_tags, window=1):
    """Of one step of (tags, sources)."""
    information = TagSourceInformation(num_tags, window)
    information.add(1, *zip(*questions))
    return information.value()


def random_matching(rng, questions, num_tags, num_traces, sources, replace=False):
    return [
        (
            rng.permutation(num_tags)[:num_traces].tolist(),
            [f"s{k}" for k in rng.choice(sources, num_traces, replace=replace)],
        )
        for _ in range(questions)
    ]


@pytest.mark.parametrize(
    ("questions", "num_tags", "num_traces", "sources", "replace"),
    [
        (20, 6, 4, 6, False),
        (20, 6, 6, 6, False),  # tags and sources all used once: more bias than of independent draws
        (20, 6, 1, 6, False),
        (40, 4, 4, 2, True),  # several traces from one source
        (30, 6, 4, 40, False),  # more cells than traces
    ],
)
def test_a_random_matching_has_none_on_average(questions, num_tags, num_traces, sources, replace):
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for seed in range(150):
        data = random_matching(rng, questions, num_tags, num_traces, sources, replace)
        table = np.zeros((num_tags, sources))
        for tags, names in data:
            np.add.at(table, (tags, [int(name[1:]) for name in names]), 1)
        plain.append(mutual_information_bits(table))
        information = TagSourceInformation(num_tags, 1, seed=seed)
        information.add(1, *zip(*data))
        corrected.append(information.value())
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected)) < 3 * error
    assert np.mean(plain) > 5 * np.std(plain) / math.sqrt(len(plain))  # the bias is there to be corrected


def test_full_information():
    rng = np.random.default_rng(0)
    own = [(k, [f"s{i}" for i in k]) for k in (rng.permutation(6)[:4].tolist() for _ in range(50))]
    assert value(own, 6) == pytest.approx(1.0)
    two_tags_each = [(k, [f"s{i // 2}" for i in k]) for k, _ in own]
    assert value(two_tags_each, 6) == pytest.approx(1.0)
    two_sources_each = [(k, [f"s{i + 6 * rng.integers(2)}" for i in k]) for k, _ in own]
    assert value(two_sources_each, 6) > 0.95
    halfway = own[:25] + random_matching(rng, 25, 6, 4, 6)
    assert 0.1 < value(halfway, 6) < 0.5


def test_rounding_does_not_exceed_the_maximum():
    rng = np.random.default_rng(0)
    for n in range(20, 120):
        data = [
            (k, [f"s{i}" for i in k]) for k in (rng.permutation(6)[: rng.integers(1, 7)].tolist() for _ in range(n))
        ]
        assert 1 - 1e-9 < value(data, 6) <= 1


def test_random_tags_differ_from_step_to_step():
    """Else the same slot would get the same random tag in every step."""
    rng = np.random.default_rng(0)
    values = []
    for seed in range(20):
        information = TagSourceInformation(6, 60, seed=seed)
        for step in range(60):
            information.add(step, [rng.permutation(6)[:4].tolist()], [[None] * 4])
        values.append(information.value())
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_one_tag_for_everything_is_no_information():
    data = [([0], [f"s{k % 6}"]) for k in range(60)]
    assert value(data, 6) < 0  # less than a random matching shows


def test_nothing_can_be_said_without_sources_that_differ():
    assert TagSourceInformation(6, 1).value() is None
    assert value([([0, 1], ["a", "a"])] * 30, 6) is None
    assert value([([0, 1, 2], ["a", "b", "c"])], 6) is None  # any matching of three traces looks like that
    assert value([([0], ["a"]), ([0], ["b"])] * 30, 1) is None


def test_too_many_sources_are_given_up_while_they_last():
    limit = MAX_CELLS // 4
    information = TagSourceInformation(4, 2)
    own = [[0, 1, 2, 3]] * 20, [SOURCES] * 20
    information.add(0, *own)
    information.add(1, [[0]] * (limit - 4), [[f"s{k}"] for k in range(limit - 4)])
    assert information._tables() is not None
    information.add(2, *own)
    information.add(3, [[0]] * (limit - 3), [[f"t{k}"] for k in range(limit - 3)])
    assert information._tables() is None and information.value() is None
    assert information.tag_counts.tolist() == [20 + limit - 3, 20, 20, 20]
    information.add(4, *own)
    information.add(5, *own)
    assert information.value() == 1.0


def test_names_out_of_the_window_are_forgotten():
    rng = np.random.default_rng(0)
    long, names = TagSourceInformation(4, 2), itertools.count()
    for step in range(20):
        fresh = [[f"s{next(names)}"] for _ in range(5000)]
        long.add(2 * step, [[int(t)] for t in rng.integers(0, 4, 5000)], fresh)
        long.add(2 * step + 1, [[0, 1, 2, 3]] * 20, [SOURCES] * 20)
    assert len(long._names) < 2 * MAX_CELLS < next(names)
    long.add(98, [[0, 1, 2, 3], [2]] * 20, [SOURCES, ["x"]] * 20)
    long.add(99, [[0, 1, 2, 3], [2]] * 20, [SOURCES, ["y"]] * 20)
    short = TagSourceInformation(4, 2)
    short.add(98, [[0, 1, 2, 3], [2]] * 20, [SOURCES, ["x"]] * 20)
    short.add(99, [[0, 1, 2, 3], [2]] * 20, [SOURCES, ["y"]] * 20)
    assert long.value() == short.value() > 0.5


def test_only_the_window_counts():
    rng = np.random.default_rng(0)
    steps = [random_matching(rng, 10, 5, 3, 4 + k) for k in range(12)]
    long = TagSourceInformation(5, 4)
    for k, step in enumerate(steps):
        long.add(k, *zip(*step))
        short = TagSourceInformation(5, 4)
        for j in range(max(0, k - 3), k + 1):
            short.add(j, *zip(*steps[j]))
        assert long.value() == short.value()
        assert long.tag_counts.tolist() == short.tag_counts.tolist()
        assert long.tag_counts.sum() == sum(len(tags) for step in steps[max(0, k - 3) : k + 1] for tags, _ in step)
        assert long.is_full == (k >= 3)


def test_the_order_of_traces_does_not_change_the_information():
    rng = np.random.default_rng(0)
    data = random_matching(rng, 30, 6, 4, 5)
    orders = [rng.permutation(4) for _ in data]
    shuffled = [([tags[j] for j in o], [names[j] for j in o]) for (tags, names), o in zip(data, orders)]
    assert value(data, 6) == value(shuffled, 6)


# -- the watch -----------------------------------------------------------------------------------------------------

SOURCES = ["a", "b", "c", "d"]


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


def test_it_takes_well_under_a_millisecond_a_step():
    rng = np.random.default_rng(0)
    costs = [rng.random((6, 4)) for _ in range(32)]
    step = [assigned(c) for c in costs], [[f"teacher {k}" for k in rng.permutation(8)[:4]] for _ in costs]
    watch = CollapseWatch(6)
    seconds = []
    for _ in range(60):
        begin = time.perf_counter()
        watch.update(*step)
        seconds.append(time.perf_counter() - begin)
    assert np.quantile(seconds[20:], 0.1) < 0.8e-3  # not the median: other programs run beside this one
