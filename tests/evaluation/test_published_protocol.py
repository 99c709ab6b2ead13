"""The published protocol against its rules, stated once more here without the project's functions."""

from __future__ import annotations

import random

import pytest

from megatron_ssft.evaluation.published_protocol import own_tag_figures, published_figures


def restated_winner(answers):
    """The answer whose count is highest; `max` keeps the first of several."""
    return max(answers, key=answers.count)


def restated(predictions, verdict, num_tags, k):
    """(native cons, cons@k grouped, cons@k interleaved) from the flat list that holds the samples tag after tag."""
    per_tag = len(predictions) // num_tags
    native = 0
    for s in range(per_tag):
        native += verdict[restated_winner([predictions[tag * per_tag + s] for tag in range(num_tags)])]
    in_turn = [predictions[tag * per_tag + s] for s in range(per_tag) for tag in range(num_tags)]
    return (
        native / per_tag,
        float(verdict[restated_winner(predictions[:k])]),
        float(verdict[restated_winner(in_turn[:k])]),
    )


@pytest.mark.parametrize(("num_tags", "per_tag", "k"), [(6, 11, 32), (6, 6, 32), (2, 3, 4), (4, 2, 3), (6, 11, 66)])
def test_figures_equal_a_restatement_on_random_samples(num_tags, per_tag, k):
    rng = random.Random(num_tags * per_tag)
    results = set()
    for _ in range(300):
        answers = ["1", "2", "3", "4", None][: rng.randrange(1, 6)]
        flat = [rng.choice(answers) for _ in range(num_tags * per_tag)]
        verdict = {"1": True, "2": False, "3": rng.random() < 0.3, "4": False, None: False}
        by_tag = [flat[tag * per_tag : (tag + 1) * per_tag] for tag in range(num_tags)]
        correct = [[verdict[answer] for answer in own] for own in by_tag]
        tag = rng.randrange(num_tags)
        figures = published_figures(by_tag, correct, pass_tag=tag, samples=k)
        assert (figures.native_cons, figures.cons_grouped, figures.cons_interleaved) == pytest.approx(
            restated(flat, verdict, num_tags, k)
        )
        assert figures.pass_at_1 == pytest.approx(sum(correct[tag][:k]) / min(k, per_tag))
        assert (figures.native_votes, figures.pass_samples) == (per_tag, min(k, per_tag))
        results.add((figures.cons_grouped, figures.cons_interleaved))
    assert len(results) > 2 or k == 66  # the two forms are told apart


def test_failures_vote_together_and_the_first_seen_wins_a_tie():
    by_tag, correct = [["7"], [None], [None]], [[True], [False], [False]]
    assert published_figures(by_tag, correct, pass_tag=0, samples=3).native_cons == 0
    by_tag, correct = [["7"], ["8"]], [[True], [False]]
    assert published_figures(by_tag, correct, pass_tag=0, samples=2).native_cons == 1
    assert published_figures(by_tag[::-1], correct[::-1], pass_tag=0, samples=2).native_cons == 0


def test_pass_at_1_takes_the_first_32_samples_under_one_tag():
    correct = [[True] * 32 + [False] * 8, [False] * 40]
    answers = [["1" if flag else "2" for flag in flags] for flags in correct]
    assert published_figures(answers, correct, pass_tag=0).pass_at_1 == 1
    assert published_figures(answers, correct, pass_tag=1).pass_at_1 == 0
    short = published_figures([["1", "2", "1"]], [[True, False, True]], pass_tag=0)
    assert (short.pass_at_1, short.pass_samples) == (pytest.approx(2 / 3), 3)
    assert published_figures(answers, correct, pass_tag=None).pass_at_1 is None


def test_what_the_samples_do_not_allow_is_none():
    few = published_figures([["1"] * 5] * 6, [[True] * 5] * 6, pass_tag=0)
    assert few.native_cons == 1 and few.cons_grouped is None and few.cons_interleaved is None  # 30 samples
    uneven = published_figures([["1"] * 40, ["1"] * 39], [[True] * 40, [True] * 39], pass_tag=1)
    assert uneven.native_cons is uneven.cons_grouped is uneven.cons_interleaved is None and uneven.pass_at_1 == 1
    absent = published_figures([["1"], []], [[True], []], pass_tag=1)
    assert absent.native_cons is None and absent.pass_at_1 is None and absent.native_votes == 0
    alone = published_figures([["1"] * 32], [[True] * 32], pass_tag=0)
    assert alone.native_cons is None and alone.cons_grouped == alone.cons_interleaved == 1


def test_tags_the_model_chose_are_pooled_in_the_order_drawn():
    figures = own_tag_figures([True] * 8 + [False] * 24 + [True] * 8)
    assert (figures.pass_at_1, figures.pass_samples) == (0.25, 32)
    assert figures.native_cons is figures.cons_grouped is figures.cons_interleaved is None
    assert own_tag_figures([True, False]).pass_at_1 == 0.5 and own_tag_figures([]).pass_at_1 is None
