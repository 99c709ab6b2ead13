"""Mutual information between tag and source: without bias, in a window, whatever the order of traces."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_ssft.matching.collapse import (
    MAX_CELLS,
    TagSourceInformation,
)
from megatron_ssft.matching.statistics import mutual_information_bits

SOURCES = ["a", "b", "c", "d"]


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
