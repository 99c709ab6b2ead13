"""Every question exactly once an epoch, never split, batches as full as they can be, exact resume."""

from __future__ import annotations

import collections
import itertools
import json

import numpy as np
import pytest

from megatron_ssft.data.sampler import QuestionQueue, epoch_permutation, fill_batch
from megatron_ssft.errors import UserError


def drain(queue):
    return list(iter(queue.next_batch, None))


def test_permutation_is_a_pure_function():
    for num_questions in (1, 2, 1000):
        order = epoch_permutation(num_questions, seed=3, epoch=2)
        assert sorted(order.tolist()) == list(range(num_questions)) and order.dtype == np.int64
        assert np.array_equal(order, epoch_permutation(num_questions, seed=3, epoch=2))
    orders = {tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(-5, 5) for epoch in range(10)}
    assert len(orders) == 100


def test_permutation_never_changes():
    """Resuming a run started with other library versions relies on it."""
    assert epoch_permutation(10, seed=1234, epoch=0).tolist() == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6]
    assert epoch_permutation(10, seed=1234, epoch=1).tolist() == [0, 9, 5, 6, 4, 2, 8, 1, 7, 3]


def test_permutation_is_uniform():
    first = collections.Counter(tuple(epoch_permutation(4, 0, epoch).tolist()) for epoch in range(4800))
    assert len(first) == 24 and max(abs(count - 200) for count in first.values()) < 65


def brute_fill(counts, capacity):
    best = None
    for size in range(len(counts)):
        for rest in itertools.combinations(range(1, len(counts)), size):
            total = counts[0] + sum(counts[k] for k in rest)
            if total <= capacity:
                key = (-total, [0, *rest])
                best = key if best is None else min(best, key)
    return best[1]


def test_fill_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(400):
        capacity = int(rng.integers(1, 20))
        counts = rng.integers(1, 9, rng.integers(1, 10)).tolist()
        counts[0] = min(counts[0], capacity)
        assert fill_batch(counts, capacity) == brute_fill(counts, capacity), (counts, capacity)


@pytest.mark.parametrize("lookahead", [0, 1, 7, 64])
@pytest.mark.parametrize("num_questions, most", [(1, 3), (13, 8), (101, 8), (40, 1)])
def test_every_question_once_an_epoch(num_questions, most, lookahead):
    counts = np.random.default_rng(num_questions).integers(1, most + 1, num_questions).tolist()
    batches = drain(QuestionQueue(counts, 16, lookahead, seed=5, num_epochs=4))
    visits = [(v.index, v.epoch) for batch in batches for v in batch]
    assert sorted(visits) == sorted(itertools.product(range(num_questions), range(4)))
    assert all(0 < sum(counts[v.index] for v in batch) <= 16 for batch in batches)
    assert QuestionQueue(counts, 16, lookahead, 5, 4).remaining_batches() == len(batches)


def test_batches_fill_exactly_whenever_the_window_allows():
    """The promise, replayed from outside: stream, window, head, brute force over its subsets."""
    rng = np.random.default_rng(1)
    for trial in range(60):
        counts = rng.integers(1, 7, 12).tolist()
        capacity, lookahead = int(rng.integers(6, 14)), int(rng.integers(1, 8))
        stream = [(int(index), epoch) for epoch in range(2) for index in epoch_permutation(len(counts), trial, epoch)]
        for batch in drain(QuestionQueue(counts, capacity, lookahead, trial, num_epochs=2)):
            got = [(v.index, v.epoch) for v in batch]
            total = sum(counts[index] for index, _ in got)
            reachable = brute_fill([counts[index] for index, _ in stream[:lookahead]], capacity)
            assert total >= sum(counts[stream[k][0]] for k in reachable)
            assert got[0] == stream[0]
            assert got == sorted(got, key=stream.index)
            stream = [visit for visit in stream if visit not in got]
        assert not stream


def test_variable_counts_fill_every_batch_but_the_last():
    counts = np.random.default_rng(2).integers(1, 9, 500).tolist()
    totals = [sum(counts[v.index] for v in batch) for batch in drain(QuestionQueue(counts, 32, 16, 0, num_epochs=3))]
    assert all(total == 32 for total in totals[:-1])


def test_a_batch_larger_than_the_lookahead_is_filled():
    queue = QuestionQueue([2] * 300, 128, 8, 0)
    assert [len(queue.next_batch()) for _ in range(5)] == [64] * 5


def test_equal_counts_follow_the_permutation():
    queue = QuestionQueue([4] * 20, 16, 64, seed=9, num_epochs=2)
    visits = [v for batch in drain(queue) for v in batch]
    expected = np.concatenate([epoch_permutation(20, 9, 0), epoch_permutation(20, 9, 1)])
    assert [v.index for v in visits] == expected.tolist()


def test_nothing_waits_for_long():
    """The head is always taken, so a question waits at most as many batches as stand before it."""
    counts = [5] * 30 + [3] * 300
    entered = {}
    queue = QuestionQueue(counts, 6, 20, 0, num_epochs=1)
    stream = epoch_permutation(len(counts), 0, 0).tolist()
    for step, batch in enumerate(drain(queue)):
        for visit in batch:
            entered[visit.index] = step
    assert all(entered[index] <= position for position, index in enumerate(stream))


def test_endless_stream_goes_on():
    queue = QuestionQueue([3, 1, 2], 4, 2, 0)
    seen = collections.Counter(v.index for _ in range(300) for v in queue.next_batch())
    assert max(seen.values()) - min(seen.values()) <= 4


@pytest.mark.parametrize("num_epochs", [None, 3])
def test_resume_at_every_step(num_epochs):
    counts = np.random.default_rng(3).integers(1, 9, 37).tolist()

    def fresh():
        return QuestionQueue(counts, 24, 10, seed=8, num_epochs=num_epochs)

    queue, states, batches = fresh(), [], []
    for _ in range(40):
        states.append(json.dumps(queue.state_dict()))
        batches.append(queue.next_batch())
    for k, state in enumerate(states):
        resumed = fresh()
        for _ in range(k % 3):
            resumed.next_batch()
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert [resumed.next_batch() for _ in range(40 - k)] == batches[k:]


def test_more_epochs_after_the_end():
    counts = [2, 3, 1, 4, 2]
    queue = QuestionQueue(counts, 4, 3, 0, num_epochs=1)
    drain(queue)
    longer = QuestionQueue(counts, 4, 3, 0, num_epochs=2)
    longer.load_state_dict(queue.state_dict())
    assert sorted((v.index, v.epoch) for batch in drain(longer) for v in batch) == [(k, 1) for k in range(5)]


def test_state_is_small_for_a_large_data_set():
    queue = QuestionQueue([4] * 200_000, 32, 64, 0)
    queue.next_batch()
    assert len(json.dumps(queue.state_dict())) < 2_000


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="no question"):
        QuestionQueue([], 8, 4, 0)
    with pytest.raises(UserError, match=r"question 2 of the data has 9 traces, .* --max-traces 8"):
        QuestionQueue([8, 9], 8, 4, 0)
    state = QuestionQueue([1, 2], 8, 4, seed=0).state_dict()
    with pytest.raises(UserError, match="2 questions, this run has 3 questions"):
        QuestionQueue([1, 2, 3], 8, 4, seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="--seed 0, this run has --seed 1"):
        QuestionQueue([1, 2], 8, 4, seed=1).load_state_dict(state)
