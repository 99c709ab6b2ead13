"""Arrays equal a token-by-token reference; the denominator equals the weights of the whole batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ssft.layouts.padded import collate, loss_denominator
from megatron_ssft.matching import Matcher
from megatron_ssft.records import (
    PAD,
    ForkingTokens,
    QuestionBatch,
    QuestionVisit,
    SequenceSpec,
    TokenizedSet,
)
from megatron_ssft.scheduling import RowLimits, WorkModel, plan_cost_rows, plan_train_rows
from megatron_ssft.scheduling.work import padded_microbatch

WORK = WorkModel(1.0, 2e-3, 0.0)
SPECIAL = ForkingTokens(("<1>", "<2>", "<3>", "<4>"), ((500,), (501,), (502,), (503,)), "special")
TEXT = ForkingTokens(("<1>", "<2>", "<3>", "<4>"), ((7, 8), (7, 9, 10), (7, 11, 12, 13), (14,)), "text")
SETTINGS = list(itertools.product((SPECIAL, TEXT), (False, True), ("token", "sequence"), (1, 8)))


def make_batch(seed=0, questions=6, empty_prompt=False):
    rng = np.random.default_rng(seed)
    sets = []
    for k in range(questions):
        traces = int(rng.integers(1, 5))
        completions = tuple(rng.integers(1, 400, rng.integers(1, 30)).astype(np.int32) for _ in range(traces))
        prompt = rng.integers(1, 400, 0 if empty_prompt else rng.integers(1, 20)).astype(np.int32)
        sets.append(TokenizedSet(f"q{k}", "set.jsonl", k + 1, prompt, completions, (None,) * traces))
    return QuestionBatch(tuple(QuestionVisit(k, 0) for k in range(questions)), tuple(sets))


def reference(batch, microbatch, tags, max_completion_tokens, train_forking_token, loss_normalization, pad_to_multiple):
    """tokens, positions, targets, weights, one token at a time."""
    rows, longest = [], 1
    for spec in microbatch.sequences:
        row = []
        if not spec.is_pad:
            example = batch.sets[spec.question]
            stream = [(int(t), False) for t in example.prompt_ids]
            stream += [(t, train_forking_token) for t in tags.ids[spec.tag]]
            completion = example.completion_ids[spec.trace].tolist()
            if max_completion_tokens is not None:
                completion = completion[:max_completion_tokens]
            stream += [(t, True) for t in completion]
            for (token, _), (target, counts) in zip(stream, stream[1:]):
                row.append((token, target if counts else 0, 1.0 if counts else 0.0))
        rows.append(row)
        longest = max(longest, len(row))
    width = longest
    while width % pad_to_multiple:
        width += 1
    arrays = [[], [], [], []]
    for row in rows:
        counted = sum(weight for _, _, weight in row)
        row = row + [(0, 0, 0.0)] * (width - len(row))
        arrays[0].append([token for token, _, _ in row])
        arrays[1].append(list(range(width)))
        arrays[2].append([target for _, target, _ in row])
        scale = counted if loss_normalization == "sequence" and counted else 1.0
        arrays[3].append([weight / scale for _, _, weight in row])
    return arrays


def check(batch, plan, tags, cut, train_tag, normalization, multiple):
    options = {
        "max_completion_tokens": cut,
        "train_forking_token": train_tag,
        "loss_normalization": normalization,
        "pad_to_multiple": multiple,
    }
    total = 0.0
    for microbatch in (mb for rank in plan.ranks for mb in rank):
        arrays = collate(batch, microbatch, tags, **options)
        tokens, positions, targets, weights = reference(batch, microbatch, tags, **options)
        assert arrays.tokens.dtype == arrays.position_ids.dtype == arrays.targets.dtype == np.int64
        assert arrays.weights.dtype == np.float32
        assert arrays.tokens.tolist() == tokens
        assert arrays.position_ids.tolist() == positions
        assert arrays.targets.tolist() == targets
        np.testing.assert_allclose(arrays.weights, weights, rtol=1e-6)
        assert all(a.flags.c_contiguous and a.flags.writeable for a in vars(arrays).values())
        total += arrays.weights.sum(dtype=np.float64)
    return total


@pytest.mark.parametrize("tags, train_tag, normalization, multiple", SETTINGS)
@pytest.mark.parametrize("empty_prompt", [False, True])
def test_training_arrays_and_denominator(tags, train_tag, normalization, multiple, empty_prompt):
    for seed in range(4):
        batch = make_batch(seed, empty_prompt=empty_prompt)
        assignments = Matcher("random", 4, seed).assign(batch, [None] * len(batch.sets))
        denominator = loss_denominator(
            batch, assignments, tags, train_forking_token=train_tag, loss_normalization=normalization
        )
        assert type(denominator) is int
        for ranks, b in ((1, 1), (2, 3), (3, 4)):
            plan = plan_train_rows(batch, assignments, tags, RowLimits(ranks, b), WORK)
            total = check(batch, plan, tags, None, train_tag, normalization, multiple)
            assert total == pytest.approx(denominator, rel=1e-6)


@pytest.mark.parametrize("tags", [SPECIAL, TEXT])
@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_cost_arrays_weigh_each_pair_as_a_mean(tags, cut):
    batch = make_batch(3)
    plan = plan_cost_rows(batch, cut, tags, RowLimits(2, max_tokens=120, group_size=2), WORK)
    total = check(batch, plan, tags, cut, False, "sequence", 4)
    assert total == pytest.approx(4 * batch.num_traces)
    assert check(batch, plan, tags, cut, False, "token", 4) == 4 * sum(
        min(cut, len(c)) for s in batch.sets for c in s.completion_ids
    )


def test_by_hand():
    """Prompt 1 2, tag 7 8, completion 3 4 5: what is fed, what is asked where."""
    example = TokenizedSet("q", "f", 1, np.array([1, 2], np.int32), (np.array([3, 4, 5], np.int32),), (None,))
    batch = QuestionBatch((QuestionVisit(0, 0),), (example,))
    microbatch = padded_microbatch((SequenceSpec(0, 0, 0, 6, 3), PAD))
    options = {"max_completion_tokens": None, "loss_normalization": "token", "pad_to_multiple": 4}
    arrays = collate(batch, microbatch, TEXT, train_forking_token=False, **options)
    assert arrays.tokens.tolist() == [[1, 2, 7, 8, 3, 4, 0, 0], [0] * 8]
    assert arrays.targets.tolist() == [[0, 0, 0, 3, 4, 5, 0, 0], [0] * 8]
    assert arrays.weights.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0] * 8]
    assert arrays.position_ids.tolist() == [list(range(8))] * 2
    arrays = collate(batch, microbatch, TEXT, train_forking_token=True, **options)
    assert arrays.targets.tolist() == [[0, 7, 8, 3, 4, 5, 0, 0], [0] * 8]
    assert arrays.weights.tolist() == [[0, 1, 1, 1, 1, 1, 0, 0], [0] * 8]


def test_only_pads():
    arrays = collate(
        make_batch(),
        padded_microbatch((PAD, PAD)),
        SPECIAL,
        max_completion_tokens=None,
        train_forking_token=True,
        loss_normalization="sequence",
        pad_to_multiple=2,
    )
    assert arrays.tokens.shape == (2, 2)
    assert not arrays.tokens.any() and not arrays.targets.any() and not arrays.weights.any()


def test_a_plan_for_another_cut_is_noticed():
    batch = make_batch(1)
    plan = plan_cost_rows(batch, 2, SPECIAL, RowLimits(1, max_tokens=64), WORK)
    with pytest.raises(AssertionError, match="differ"):
        for microbatch in plan.ranks[0]:
            collate(
                batch,
                microbatch,
                SPECIAL,
                max_completion_tokens=None,
                train_forking_token=False,
                loss_normalization="token",
                pad_to_multiple=1,
            )
