"""Assignments used again: who is served, what is stored, and that a resume changes nothing."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.matching.approximation import (
    AssignmentStore,
)
from megatron_ssft.records import TokenizedSet


def question(name, completions=((1, 2), (3,), (2, 9, 9)), prompt=(7, 8)):
    arrays = tuple(np.array(ids, dtype=np.int32) for ids in completions)
    return TokenizedSet(name, "set.jsonl", 1, np.array(prompt, dtype=np.int32), arrays, (None,) * len(arrays))


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_an_assignment_serves_interval_epochs(interval):
    store, evaluated = AssignmentStore(interval), []
    for epoch in range(11):
        tags = store.reusable(epoch, question("a"))
        if tags is None:
            tags = (epoch, epoch + 1, epoch + 2)
            evaluated.append(epoch)
            store.remember(epoch, question("a"), tags)
        assert tags[0] == epoch - epoch % interval
        assert store.reusable(epoch, question("a")) == tags  # asking twice changes nothing
        store.remember(epoch, question("a"), (90, 91, 92))  # nor does an evaluation in between, to measure the regret
    assert evaluated == list(range(0, 11, interval)) and len(store) == 1


def test_interval_one_keeps_nothing():
    store = AssignmentStore(1)
    store.remember(0, question("a"), (2, 0, 1))
    assert store.reusable(0, question("a")) is None and store.reusable(1, question("a")) is None
    assert len(store) == 0 and store.state_dict() == AssignmentStore(4).state_dict()
    longer = AssignmentStore(3)
    longer.remember(0, question("a"), (2, 0, 1))
    store.load_state_dict(longer.state_dict())
    assert len(store) == 0 and store.reusable(1, question("a")) is None
    with pytest.raises(ValueError, match="interval 0"):
        AssignmentStore(0)


def test_only_the_same_question_is_given_an_assignment():
    store = AssignmentStore(5)
    kept = question("a")
    store.remember(3, kept, (4, 0, 2))
    for other in (
        question("b"),
        question("a", ((1, 2), (3,), (2, 9, 8))),
        question("a", ((1, 2), (3,))),
        question("a", ((1, 2), (3,), (2, 9, 9), (3,))),
        question("a", ((1,), (2, 3), (2, 9, 9))),  # the same tokens, cut elsewhere
        question("a", ((1, 2, 3), (), (2, 9, 9))),
        question("a", prompt=(7, 9)),
        question("a", prompt=(7, 8, 1)),
        question("a", ((2,), (3,), (2, 9, 9)), prompt=(7, 8, 1)),
        question("\ud800"),  # not valid Unicode, but valid JSON
    ):
        assert store.reusable(4, other) is None
    assert store.reusable(4, kept) == (4, 0, 2)
    assert store.reusable(2, kept) is None  # made later than this visit
    wide = TokenizedSet(
        "a", "else.jsonl", 9, kept.prompt_ids, tuple(ids.astype(np.int64) for ids in kept.completion_ids), ()
    )
    assert store.reusable(4, wide) == (4, 0, 2)  # where the question stands, and how, does not matter


def test_tags_follow_their_traces_through_any_order():
    completions = ((5, 1), (2,), (300,), (2, 70000), (1, 1, 1))
    tags = (3, 9, 300, 0, 7)
    for order in itertools.permutations(range(5)):
        store = AssignmentStore(3)
        store.remember(0, question("a", completions), tags)
        shuffled = question("a", tuple(completions[j] for j in order))
        assert store.reusable(1, shuffled) == tuple(tags[j] for j in order)
        store.load_state_dict(json.loads(json.dumps(store.state_dict())))
        assert store.reusable(1, shuffled) == tuple(tags[j] for j in order)


def test_equal_traces_share_their_tags_in_any_order():
    store = AssignmentStore(2)
    store.remember(0, question("a", ((1,), (2,), (1,))), (5, 3, 4))
    tags = store.reusable(1, question("a", ((2,), (1,), (1,))))
    assert tags[0] == 3 and sorted(tags[1:]) == [4, 5]


def run(store, epochs, names, start=0):
    """The tags of every visit, where an evaluation gives other tags each time."""
    given = []
    for epoch in range(start, epochs):
        for name in names:
            tags = store.reusable(epoch, question(name))
            if tags is None:
                tags = (epoch, 1000 + int(name[1:]), 3000 + epoch)
                store.remember(epoch, question(name), tags)
            given.append((epoch, name, tags))
    return given


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_resuming_changes_nothing(interval):
    names = [f"q{k}" for k in range(12)]
    whole = AssignmentStore(interval)
    expected = run(whole, 9, names)
    for stop in range(1, 9):
        first = AssignmentStore(interval)
        given = run(first, stop, names) + run(first, stop + 1, names[:5], start=stop)  # in the middle of an epoch
        text = json.dumps(first.state_dict(), indent=1)
        second = AssignmentStore(interval)
        second.load_state_dict(json.loads(text))
        assert json.dumps(second.state_dict(), indent=1) == text
        given += run(second, stop + 1, names[5:], start=stop) + run(second, 9, names, start=stop + 1)
        assert given == expected
        assert second.state_dict() == whole.state_dict()


def keys_in(state):
    return sum(len(keys) for groups in state["assignments"].values() for keys in groups.values()) // 20


def test_what_is_used_up_is_dropped():
    names = [f"q{k}" for k in range(10)]
    store = AssignmentStore(3)
    counts = []
    for epoch in range(7):
        run(store, epoch + 1, names, start=epoch)
        counts.append(keys_in(store.state_dict()))
        assert len(store) <= 10
    assert counts == [10, 10, 0, 10, 10, 0, 10]
    run(store, 8, names[:4], start=7)
    assert store.reusable(12, question("q0")) is None and len(store) == 9  # long expired
    assert keys_in(store.state_dict()) == 9


def test_the_interval_may_change_on_resuming():
    store = AssignmentStore(4)
    store.remember(0, question("a"), (2, 0, 1))
    state = store.state_dict()
    for interval in (2, 3, 4, 6):
        other = AssignmentStore(interval)
        other.load_state_dict(state)
        assert [other.reusable(epoch, question("a")) is not None for epoch in range(8)] == [
            epoch < interval for epoch in range(8)
        ]


def test_the_state_is_small():
    tags = [np.random.default_rng(k).permutation(4)[:3].tolist() for k in range(3000)]
    store, backwards = AssignmentStore(2), AssignmentStore(2)
    for k in range(3000):
        store.remember(0, question(f"q{k}"), tags[k])
        backwards.remember(0, question(f"q{2999 - k}"), tags[2999 - k])
    assert len(json.dumps(store.state_dict(), indent=1)) < 21 * 3000
    assert json.dumps(store.state_dict()) == json.dumps(backwards.state_dict())
    replaced = AssignmentStore(2)
    replaced.remember(0, question("gone"), (0, 1, 2))
    replaced.load_state_dict(store.state_dict())
    assert replaced.reusable(1, question("gone")) is None and len(replaced) == 3000


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"assignments": []},
        {"assignments": {"0": ["x"]}},
        {"assignments": {"x": {"0,1": ""}}},
        {"assignments": {"0": {"0,x": "A" * 20}}},
        {"assignments": {"0": {"0,1": "A" * 24}}},
        {"assignments": {"0": {"0,1": "A" * 19}}},
        {"assignments": {"0": {"0,1": "?" * 20}}},
        {"assignments": {"0": {"0,1": 5}}},
    ],
)
def test_a_damaged_state_is_refused_in_one_line(state):
    store = AssignmentStore(2)
    store.remember(0, question("a"), (0, 1, 2))
    with pytest.raises(UserError, match="damaged") as caught:
        store.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert store.reusable(1, question("a")) == (0, 1, 2)


def test_as_many_tags_as_traces_are_remembered():
    with pytest.raises(ValueError, match="2 tags for the 3 traces"):
        AssignmentStore(2).remember(0, question("a"), (0, 1))
