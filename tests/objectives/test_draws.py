"""Draws of policy learning: every item once per epoch, the same in every release."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_ssft.objectives.policy.draws import first_draws, generator, nth_batch, permutation


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 2), (7, 3), (12, 5), (8, 4), (9, 8), (30, 7), (6, 1)])
def test_every_item_comes_once_an_epoch(count, size):
    drawn = [item for number in range(3 * count) for item in nth_batch(count, size, number, 3, "x")]
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize(("count", "size"), [(4, 4), (4, 9), (1, 2)])
def test_all_items_where_there_are_no_more(count, size):
    assert all(nth_batch(count, size, number, 3, "x") == list(range(count)) for number in range(4))


def test_a_batch_depends_on_its_number_alone():
    alone = nth_batch(50, 7, 11, 3, "x")
    for number in range(11):
        nth_batch(50, 7, number, 3, "x")
    assert nth_batch(50, 7, 11, 3, "x") == alone


def test_the_next_epoch_has_another_order():
    first, second = (sum((nth_batch(20, 5, number, 3, "x") for number in range(k, k + 4)), []) for k in (0, 4))
    assert first != second and sorted(first) == sorted(second)


def test_draws_of_seeds_purposes_and_epochs_differ():
    orders = {tuple(permutation(40, *key).tolist()) for key in [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), (1, "a", 1)]}
    assert len(orders) == 5
    assert generator(1, "a").random() != generator(2, "a").random() != generator(2, "b").random()


def test_permutations_stay_the_same_between_releases():
    assert permutation(8, 3, "x").tolist() == [0, 2, 1, 6, 4, 3, 7, 5]


def test_first_draws_are_different_items_and_begin_alike():
    assert sorted(first_draws(9, 20, 1, "x")) == list(range(9))
    assert first_draws(30, 5, 1, "x") == first_draws(30, 12, 1, "x")[:5]


def test_every_item_is_drawn_alike_often():
    firsts = Counter(first_draws(5, 1, seed, "x")[0] for seed in range(2000))
    assert all(320 < firsts[item] < 480 for item in range(5))  # 400 +- 4.5 standard deviations
