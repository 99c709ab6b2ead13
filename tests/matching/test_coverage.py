"""Matching statistics against counts made by hand and by brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_ssft.matching.coverage import (
    accuracy_difference,
    complete_epochs,
    count_configurations,
    learned_matchings,
    make_configuration,
    persistent_configurations,
    select_forking_token,
)
from megatron_ssft.report.read.runs import Visit, configuration_counts, whole_epochs


def visit(epoch, tags, sources, iteration=1):
    return Visit(iteration, epoch, "q", tuple(tags), tuple(sources))


SMALL = [
    visit(0, [0, 1], "ab"),
    visit(0, [1, 0], "ba"),  # the same edges, traces in another order
    visit(0, [1, 0], "ab"),
    visit(1, [0, 2], "ab"),
    visit(1, [0, 1], "ab"),
    visit(1, [2, 0], "ba"),
    visit(2, [2, 1], "ab"),
]
"""Two epochs of three questions and a begun third one."""


def random_visits(seed, epochs=4, questions=30, num_tags=5):
    """A ragged random run: 1 to 4 traces, some without a source, neighbouring epochs mixed."""
    rng = np.random.default_rng(seed)
    visits = []
    for epoch in range(epochs):
        for _ in range(questions):
            m = int(rng.integers(1, 5))
            sources = [None if rng.random() < 0.2 else "abc"[rng.integers(3)] for _ in range(m)]
            visits.append(visit(epoch, rng.permutation(num_tags)[:m].tolist(), sources))
    return sorted(visits, key=lambda v: v.epoch + rng.random() * 1.2)


def test_counts_by_hand():
    counts = count_configurations(SMALL)
    assert counts == {
        0: {((0, "a"), (1, "b")): 2, ((0, "b"), (1, "a")): 1},
        1: {((0, "a"), (2, "b")): 2, ((0, "a"), (1, "b")): 1},
        2: {((1, "b"), (2, "a")): 1},
    }
    assert list(count_configurations(SMALL[::-1])) == [0, 1, 2]


def test_a_slot_stands_in_for_an_unknown_source():
    assert make_configuration([3, 0, 1], ["a", None, None]) == ((0, "trace 2"), (1, "trace 3"), (3, "a"))
    # Slots are places in the file: here the order does matter.
    assert make_configuration([0, 1], [None, None]) != make_configuration([1, 0], [None, None])


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_the_reports_draw(seed):
    visits = random_visits(seed)
    assert count_configurations(visits) == configuration_counts(visits)
    assert complete_epochs(count_configurations(visits)) == whole_epochs(visits)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_traces_and_visits_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    visits = [visit(v.epoch, v.tags, [s or "a" for s in v.sources]) for v in random_visits(seed)]
    shuffled = []
    for k in rng.permutation(len(visits)):
        order = rng.permutation(len(visits[k].tags))
        v = visits[k]
        shuffled.append(visit(v.epoch, [v.tags[j] for j in order], [v.sources[j] for j in order]))
    one, other = count_configurations(visits), count_configurations(shuffled)
    assert one == other
    edges = learned_matchings(persistent_configurations(one))
    assert edges == learned_matchings(persistent_configurations(other))
    assert select_forking_token(edges, 5) == select_forking_token(
        learned_matchings(persistent_configurations(other)), 5
    )


A, B, C, D = (((0, name),) for name in "abcd")


@pytest.mark.parametrize(
    ("sizes", "num_questions", "complete"),
    [
        ([3, 3, 1], 3, [0, 1]),
        ([3, 3, 1], None, [0, 1]),
        ([3, 3], None, [0, 1]),
        ([3, 1], None, [0]),
        ([3], 3, [0]),
        ([3], None, []),  # perhaps cut off
        ([3], 4, []),
        ([2, 1], 3, []),  # epochs overlap where a batch reaches into the next one
        ([1, 2], None, []),
        ([], None, []),
        ([0, 0], None, []),
    ],
)
def test_complete_epochs(sizes, num_questions, complete):
    assert complete_epochs({e: Counter({A: n}) for e, n in enumerate(sizes)}, num_questions) == complete


def persistent(before, last, **more):
    """Names of Omega* for two epochs of the given counts."""
    counts = {e: Counter({((0, k),): n for k, n in c.items()}) for e, c in enumerate((before, last))}
    size = max(sum(before.values()), sum(last.values()))
    found = persistent_configurations(counts, more.pop("num_questions", size), **more)
    assert all(n == last[c[0][1]] for c, n in found.items())
    return "".join(sorted(c[0][1] for c in found))


def test_persistent_configurations_by_hand():
    # sqrt(60 + 100) * 2 = 25.3 < 40: b is dying out. c is gone, d is new, a stayed.
    before, last = {"a": 100, "b": 100, "c": 5}, {"a": 100, "b": 60, "d": 45}
    assert persistent(before, last) == "ad"
    assert persistent(before, last, tolerance=4) == "abd"
    assert persistent(before, last, tolerance=math.inf) == "abd"
    assert persistent(before, last, tolerance=0) == "ad"
    assert persistent(before, last, min_count=46) == "a"
    # one question of a thousand leaves a settled configuration
    before, last = {"a": 900, "b": 100}, {"a": 899, "b": 101}
    assert persistent(before, last) == "ab"
    assert persistent(before, last, tolerance=0) == "b"
    # exactly at the tolerance: a fall of 10 over sqrt(45 + 55)
    assert persistent({"a": 55, "b": 45}, {"a": 45, "b": 55}, tolerance=1) == "ab"
    assert persistent({"a": 55, "b": 45}, {"a": 45, "b": 55}, tolerance=0.99) == "b"


def test_persistence_compares_the_last_two_complete_epochs():
    counts = {0: Counter({A: 4}), 1: Counter({B: 3, C: 1}), 2: Counter({B: 2, A: 2}), 3: Counter({D: 3})}
    assert persistent_configurations(counts, 4) == {B: 2, A: 2}
    assert persistent_configurations(counts, 4, tolerance=0) == {A: 2}
    assert persistent_configurations({0: counts[0], 1: Counter({B: 3})}, 4) == {A: 4}
    assert persistent_configurations({0: Counter({B: 3})}, 4) == {}
    assert persistent_configurations({}, 4) == {}
    for wrong in ({"tolerance": -1}, {"min_count": 0}):
        with pytest.raises(ValueError, match="must"):
            persistent_configurations(counts, 4, **wrong)


def test_shares_are_compared_not_counts():
    # Of another data set before: 10% then and now is no fall.
    counts = {0: Counter({A: 900, B: 100}), 1: Counter({A: 90, B: 10})}
    assert persistent_configurations(counts, 100, tolerance=0) == {A: 90, B: 10}
    counts = {0: Counter({A: 90, B: 10}), 1: Counter({A: 900, B: 100})}
    assert persistent_configurations(counts, 100, tolerance=0) == {A: 900, B: 100}
    counts = {0: Counter({A: 80, B: 20}), 1: Counter({A: 900, B: 100})}
    assert persistent_configurations(counts, 100) == {A: 900}
    # 20 of 100 expected, 10 found: a fall of 10 beyond 2 sqrt(10 + 80 / 16) = 7.7
    counts = {0: Counter({A: 320, B: 80}), 1: Counter({A: 90, B: 10})}
    assert persistent_configurations(counts, 100) == {A: 90}


def test_learned_matchings_by_hand():
    edges = learned_matchings({((0, "a"), (1, "b")): 3, ((0, "a"), (2, "b")): 2, ((1, "b"),): 4})
    assert edges == {(0, "a"): 5, (1, "b"): 7, (2, "b"): 2}


def ranking(edges, num_tags):
    return [t.tag for t in select_forking_token(edges, num_tags)]


def test_ranking_by_hand():
    edges = {(1, "a"): 1, (1, "b"): 1, (1, "c"): 1, (2, "a"): 50, (2, "b"): 2, (3, "a"): 30, (3, "c"): 22, (0, "a"): 90}
    found = select_forking_token(edges, 5)
    assert [t.tag for t in found] == [1, 2, 3, 0, 4]
    assert [(t.degree, t.weighted_degree) for t in found] == [(3, 3), (2, 52), (2, 52), (1, 90), (0, 0)]
    assert list(found[1].sources.items()) == [("a", 50), ("b", 2)]
    assert found[0].reason == "most distinct sources: 3, <think3> has 2"
    assert found[2].reason == "<think4> is tied with the tag above and the higher tag"
    assert found[3].reason == "1 distinct sources, 2 above"
    assert found[4].reason == "matched to nothing"
    by_weight = select_forking_token({(0, "a"): 3, (1, "a"): 4}, 2)
    assert by_weight[0].reason == "as many distinct sources as <think1> (1), matched more often: 4 to 3"
    assert by_weight[1].reason == "as many distinct sources (1), matched less often: 3 to 4"
    tied = select_forking_token({(0, "a"): 3, (1, "b"): 3}, 2)
    assert tied[0].tag == 0 and "tied with <think2>" in tied[0].reason
    assert select_forking_token({(0, "a"): 3}, 1)[0].reason == "it is the only tag"


@pytest.mark.parametrize("seed", range(20))
def test_ranking_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 3, (6, 4))  # small numbers: many ties
    found = ranking({(i, "abcd"[k]): int(w) for (i, k), w in np.ndenumerate(weights) if w}, 6)

    def beats(i, j):
        a, b = weights[i], weights[j]
        if (a > 0).sum() != (b > 0).sum():
            return (a > 0).sum() > (b > 0).sum()
        return a.sum() > b.sum() or (a.sum() == b.sum() and i < j)

    assert sorted(found) == list(range(6))
    assert all(beats(i, j) for i, j in itertools.combinations(found, 2))


def shares(values):
    return {f"q{k}": v for k, v in enumerate(values)}


def test_accuracy_difference_by_hand():
    found = accuracy_difference(
        shares([1.0, 0.5, 0.0, 1.0]) | {"mine": 1.0}, shares([0.0, 0.5, 0.5, 0.5]) | {"its": 0.0}
    )
    # differences 1, 0, -.5, .5: mean .25, squares about it .5625, .0625, .5625, .0625
    assert found.value == pytest.approx(0.25) and found.questions == 4
    assert found.stderr == pytest.approx(math.sqrt(1.25 / 3 / 4))
    assert accuracy_difference({"a": 1.0}, {"b": 1.0}) is None
    one = accuracy_difference({"a": 1.0}, {"a": 0.0})
    assert (one.value, one.p_value, one.questions) == (1.0, 1.0, 1) and math.isnan(one.stderr)


@pytest.mark.parametrize("seed", range(6))
def test_p_values_by_all_flips_of_the_signs(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, (2, 10)) / 4 + [[0.2 * seed], [0.0]]
    flips = np.array(list(itertools.product([-1, 1], repeat=10)))
    exact = (np.abs(flips @ (a - b)) >= abs((a - b).sum()) - 1e-9).mean()
    found = accuracy_difference(shares(a), shares(b))
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2000) + 1e-3)
    corrected = accuracy_difference(shares(a), shares(b), comparisons=3)
    assert corrected.p_value == pytest.approx(min(1.0, 3 * found.p_value))
    assert accuracy_difference(shares(b), shares(a)).p_value == found.p_value


def test_few_questions_never_decide_and_many_do():
    for questions in range(1, 6):
        assert accuracy_difference(shares([1.0] * questions), shares([0.0] * questions)).is_noise
    assert not accuracy_difference(shares([1.0] * 20), shares([0.0] * 20), comparisons=5).is_noise
    assert accuracy_difference(shares([1.0, 0.0] * 20), shares([0.0, 1.0] * 20)).is_noise
    assert accuracy_difference(shares([0.5] * 20), shares([0.5] * 20)).p_value == 1.0
