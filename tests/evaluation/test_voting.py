"""Votes: against votes that are held, in every order, and values worked out by hand."""

from __future__ import annotations

import itertools
import random
import time
from fractions import Fraction

import numpy as np
import pytest

from megatron_ssft.evaluation.voting import (
    answer_labels,
    cons_at_k,
    cons_over_sets,
    grouped,
    interleaved,
    majority_vote,
    native_cons,
    published_vote,
)
from megatron_ssft.scoring.verifiers import mathematics
from megatron_ssft.scoring.verifiers.answer_forms import are_apart, entries
from megatron_ssft.scoring.verifiers.math_equivalence import MathEquivalence
from tests.helpers.math_pairs import SLOW


def draw_winner(labels, correct, rng):
    """A vote as it would be held: drop failures, count, draw among the winners, judge a random sample of the winner."""
    voters = [label for label in labels if label is not None]
    if not voters:
        return False
    most = max(voters.count(label) for label in voters)
    winner = rng.choice(sorted({label for label in voters if voters.count(label) == most}))
    return rng.choice([flag for label, flag in zip(labels, correct) if label == winner])


def test_majority_vote_is_the_expectation_of_a_fair_draw():
    rng = random.Random(0)
    for _ in range(20):
        labels = [rng.choice(["a", "b", "c", None]) for _ in range(rng.randrange(7))]
        correct = [label == "a" or (label == "b" and rng.random() < 0.5) for label in labels]
        held = [draw_winner(labels, correct, rng) for _ in range(3000)]
        assert majority_vote(labels, correct) == pytest.approx(np.mean(held), abs=0.04)


def test_majority_vote_by_hand():
    assert majority_vote([], []) == 0
    assert majority_vote([None, None], [False, False]) == 0
    assert majority_vote([None, None, "a"], [False, False, True]) == 1
    assert majority_vote(["a", "b", "a"], [True, False, True]) == 1
    assert majority_vote(["a", "b"], [True, False]) == 0.5
    assert majority_vote(["a", "b", "c"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_vote(["a", "a"], [True, False]) == 0.5  # one answer judged in two ways
    assert majority_vote([0, 0, None], [True, True, False]) == 1  # labels may be falsy
    with pytest.raises(ValueError):
        majority_vote(["a"], [])


def test_our_vote_does_not_depend_on_the_order_and_the_published_one_does():
    votes = [("a", True), ("b", False), (None, False), ("b", False), ("a", True)]
    ours = {majority_vote(*zip(*order)) for order in itertools.permutations(votes)}
    assert ours == {0.5}
    assert {published_vote(*zip(*order)) for order in itertools.permutations(votes)} == {0.0, 1.0}


def test_published_vote_by_hand():
    assert published_vote([], []) == 0
    assert published_vote(["b", "a", "a", "b"], [False, True, True, False]) == 0  # b was seen first
    assert published_vote(["a", "b", "b", "a"], [True, False, False, True]) == 1
    assert published_vote(["a", None, None], [True, False, False]) == 0  # failures win together
    assert published_vote(["a", None], [True, False]) == 1
    assert published_vote(["a", "a"], [True, False]) == 1  # the first sample of the winner is judged


def close(a, b):
    """Not transitive, and asked in one direction only, as a real comparison may be."""
    return 0 <= float(b) - float(a) <= 1


def test_equivalent_answers_are_joined_whatever_their_order():
    assert answer_labels(["x", None, "y", "x"]) == [0, None, 2, 0]
    assert answer_labels([]) == [] and answer_labels([None]) == [None]
    answers = ["1", "2", "3", "7", "3", None, "8"]
    for order in itertools.permutations(answers):
        labels = answer_labels(order, close)
        groups = {label: {a for a, own in zip(order, labels) if own == label} for label in labels}
        assert {frozenset(group) for group in groups.values()} == {
            frozenset("123"),
            frozenset("78"),
            frozenset([None]),
        }
        assert all(label is None or labels[label] == label for label in labels)


def test_equivalence_is_not_asked_in_vain():
    asked = []
    answer_labels(["1", "1", None, "1"], lambda a, b: asked.append((a, b)))
    assert asked == []
    answer_labels(["1", "2", "3"], lambda a, b: asked.append((a, b)) or True)
    assert len(asked) == 2  # the third pair is joined already


def test_mathematical_equivalence_changes_the_winner():
    answers, correct = ["1/2", "3", "0.5", "3", "2/4"], [True, False, True, False, True]
    equivalent = lambda a, b: Fraction(a) == Fraction(b)  # noqa: E731
    assert majority_vote(answer_labels(answers), correct) == 0
    assert majority_vote(answer_labels(answers, equivalent), correct) == 1


def test_orders_of_the_list():
    by_tag = ["abc", "d", "", "ef"]
    assert grouped(by_tag) == list("abcdef")
    assert interleaved(by_tag) == list("adebfc")
    assert grouped([]) == interleaved([]) == []
    tags = [[i] * 11 for i in range(6)]
    assert [interleaved(tags)[:32].count(i) for i in range(6)] == [6, 6, 5, 5, 5, 5]
    assert set(grouped(tags)[:32]) == {0, 1, 2}


def test_native_cons_takes_the_sth_sample_of_every_tag():
    labels = [["a", "b"], ["a", "c"], ["b", "c"]]
    correct = [[True, False], [True, False], [False, False]]
    assert native_cons(labels, correct, majority_vote) == [1.0, 0.0]
    assert native_cons([["a", "b"], ["a"]], [[True, False], [True]], majority_vote) == [1.0]
    assert native_cons([["a"], []], [[True], []], majority_vote) == []
    assert native_cons([], [], majority_vote) == []


def test_cons_over_lists():
    labels, correct = list("aabbb"), [True, True, False, False, False]
    assert cons_at_k(labels, correct, 2, majority_vote) == 1
    assert cons_at_k(labels, correct, 4, majority_vote) == 0.5
    assert cons_at_k(labels, correct, 5, majority_vote) == 0
    for k in (0, 6):
        with pytest.raises(ValueError):
            cons_at_k(labels, correct, k, majority_vote)
    assert cons_over_sets(labels, correct, 2, majority_vote) == [1, 0]
    assert cons_over_sets(labels, correct, 6, majority_vote) == []
    with pytest.raises(ValueError):
        cons_over_sets(labels, correct, 0, majority_vote)


def test_sets_of_the_interleaved_list_are_the_native_votes():
    rng = random.Random(1)
    labels = [[rng.choice(["a", "b", None]) for _ in range(5)] for _ in range(4)]
    correct = [[label == "a" for label in own] for own in labels]
    sets = cons_over_sets(interleaved(labels), interleaved(correct), 4, majority_vote)
    assert sets == native_cons(labels, correct, majority_vote)


def test_the_math_verifier_decides_and_a_comparison_that_does_not_end_is_a_difference():
    slow_gold, slow_answer = SLOW[0]
    with MathEquivalence(seconds=1.0) as equivalent:
        assert equivalent("1/2", "0.5") and equivalent("007", "7") and not equivalent("1/2", "1/3")
        assert equivalent.asked == 0  # forms decide
        assert not equivalent("x=3", "y") and (equivalent.asked, equivalent.unsettled) == (1, 0)
        started = time.monotonic()
        assert not equivalent(slow_gold, slow_answer) and equivalent.unsettled == 1
        assert time.monotonic() - started >= 1.0
        assert not equivalent(slow_gold, slow_answer) and equivalent.asked == 2  # not again
        assert equivalent("\\sqrt{8}", "2\\sqrt{2}")  # by another process


ANSWERS = [
    *["12", "012", "12.0", "\\frac{24}{2}", "1/3", "0.333333", "0.3334", "\\dfrac13", "2\\sqrt{2}", "\\sqrt{8}"],
    *["3\\sqrt{2}", "x+1", "1+x", "x-1", "x=3", "3", "(1,2)", "(1, 2)", "(2,1)", "\\{1,2\\}", "30^\\circ", "30"],
    *["45^\\circ", "50\\%", "0.5", "5\\text{ cm}", "5", "\\pi"],
]


@pytest.mark.slow
def test_forms_and_signatures_change_no_comparison():
    """All pairs as the verifier judges them one by one; most need not be asked for."""
    pairs = list(itertools.combinations(ANSWERS, 2))
    same = {pair for pair in pairs if mathematics.equal(*pair) or mathematics.equal(*pair[::-1])}
    assert len(same) > 9
    with MathEquivalence(seconds=60.0, workers=2) as equivalent:
        pieces = []
        equivalent.prepare([ANSWERS[:16], ANSWERS[8:], ANSWERS], lambda items, total: pieces.append(total) or items)
        asked = equivalent.asked
        labels = answer_labels(ANSWERS, equivalent)
        direct = answer_labels(ANSWERS, lambda a, b: (a, b) in same or (b, a) in same)
        assert labels == direct
        assert equivalent.asked == asked < 0.4 * len(pairs) and equivalent.unsettled == 0
    assert sum(pieces) >= asked


def test_values_far_apart_are_told_apart_and_close_ones_are_asked_for():
    rng = random.Random(2)
    for _ in range(300):
        value = rng.choice([rng.uniform(-1e6, 1e6), rng.uniform(-1, 1), rng.randrange(-50, 50)])
        assert not are_apart([value], [value * (1 + 1e-12) + 4e-6])
        assert are_apart([value], [value + 1e-3 * max(1, abs(value))])
    assert are_apart([1, 2], [1, 3]) and not are_apart([1, 2], [2, 1]) and not are_apart([1, 1], [1])
    assert entries("x=3") == ["3"] and entries("(1, x)") == ["1", "x"]
    for doubtful in ("1 1/2", "4t", "10^{10^{10}}", "5 cm", "2, \\ldots, 8", "30^\\circ", "x=y", "x<3", "50\\%"):
        assert entries(doubtful) is None, doubtful
