"""FLOPs of plans: by hand, without padding, the same whatever the layout's padding and PADs."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.records import Assignment, ForkingTokens, QuestionBatch, QuestionVisit, Size, TokenizedSet
from megatron_ssft.scheduling import (
    RowLimits,
    StreamLimits,
    WorkModel,
    plan_cost_rows,
    plan_cost_streams,
    plan_train_rows,
    plan_train_streams,
)
from megatron_ssft.scheduling.accounting import FlopAccountant, useful_size

WORK = WorkModel(token=1000.0, pair=1.0, scored=100.0)
TAGS = ForkingTokens(("<1>", "<2>"), ((7,), (8,)), "special")


def batch():
    """One question: a prompt of 10 tokens, traces of 3 and 5."""
    traces = tuple(np.arange(n, dtype=np.int32) for n in (3, 5))
    example = TokenizedSet("q", "f", 1, np.zeros(10, dtype=np.int32), traces, (None, None))
    return QuestionBatch((QuestionVisit(0, 0),), (example,))


def triangle(n):
    return n * (n + 1) // 2


def test_padded_plans_count_what_is_real():
    """Sequences of 13 and 15 tokens (the last target is no input) in rows of 15, beside two PADs."""
    plan = plan_train_rows(batch(), [Assignment((0, 1))], TAGS, RowLimits(1, micro_batch_size=4), WORK)
    assert plan.size.tokens == 60
    expected = Size(28, triangle(13) + triangle(15), 8)
    assert useful_size(plan) == expected
    flops = 28 * 1000 + (triangle(13) + triangle(15)) + 8 * 100
    assert FlopAccountant(WORK).forward(plan) == flops
    assert FlopAccountant(WORK).training(plan) == 3 * flops


def test_streams_count_what_is_shared_once():
    """Prompt 10, then two tags with 2 and 4 more tokens; a PAD stream for the second rank's want of work."""
    plan = plan_train_streams(batch(), [Assignment((0, 1))], TAGS, StreamLimits(3, max_tokens=100), WORK)
    assert plan.pad_sequences == 1
    alone = plan_train_streams(batch(), [Assignment((0, 1))], TAGS, StreamLimits(1, max_tokens=100), WORK)
    assert useful_size(alone) == Size(10 + 3 + 5, triangle(13) + triangle(15) - triangle(10), 8)
    assert useful_size(plan) == Size(28, triangle(13) + triangle(15), 8)  # a rank each: the prompt twice


def test_cost_pass_by_hand():
    """T_r = 4: 2 tags x (3 and 4 tokens). Naive: 13 and 14 inputs a pair. Shared: 10 + 2 x (1 + 2 + 3)."""
    naive = plan_cost_rows(batch(), 4, TAGS, RowLimits(1, max_tokens=1000), WORK)
    assert useful_size(naive) == Size(2 * 27, 2 * (triangle(13) + triangle(14)), 14)
    ours = plan_cost_streams(batch(), 4, TAGS, StreamLimits(1, max_tokens=1000), WORK)
    # each trace sees prompt and tag (11 tokens) and itself
    pairs = triangle(11) + 11 + 2 * (2 * 11 + triangle(2) + 3 * 11 + triangle(3))
    assert useful_size(ours).tokens == 10 + 2 * (1 + 2 + 3)
    assert useful_size(ours).scored == 14
    assert useful_size(ours).pairs == pytest.approx(pairs)
