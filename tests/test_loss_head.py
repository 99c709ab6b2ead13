"""The chunked vocabulary-parallel head against plain cross entropy over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_ssft.parallel import loss_head
from megatron_ssft.parallel.loss_head import VocabParallelHead
from tests.distributed import run_ranks

HIDDEN, PADDED = 8, 24


def compare(vocab_size, tokens, chunk, with_tags):
    dist.init_process_group("gloo")
    loss_head.CHUNK_TOKENS = chunk
    group = dist.group.WORLD
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=draw)
    table = torch.randn(PADDED, HIDDEN, generator=draw) * 3
    targets = torch.randint(vocab_size, (tokens,), generator=draw)
    weights = torch.rand(tokens, generator=draw)
    tag_ids = (1, vocab_size - 1, vocab_size // 2) if with_tags else ()
    rows = torch.randn(len(tag_ids), HIDDEN, generator=draw) if with_tags else None

    whole = table.clone()
    if with_tags:
        whole[list(tag_ids)] = rows
    whole = whole[:vocab_size].double().requires_grad_()
    wide = hidden.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide @ whole.T, targets, reduction="none")
    (expected * weights).sum().backward()

    size = PADDED // dist.get_world_size()
    start = dist.get_rank() * size
    shard = table[start : start + size].clone().requires_grad_()
    mine = hidden.clone().requires_grad_()
    own = rows.clone().requires_grad_() if with_tags else None
    nll = VocabParallelHead(vocab_size, size, tag_ids, group).nll(mine, shard, targets, own)
    assert nll.dtype == torch.float32
    (nll * weights).sum().backward()
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    dist.all_reduce(mine.grad)
    torch.testing.assert_close(mine.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    reference = torch.zeros(PADDED, HIDDEN, dtype=torch.float64)
    reference[:vocab_size] = whole.grad
    if with_tags:
        dist.all_reduce(own.grad)
        torch.testing.assert_close(own.grad.double(), reference[list(tag_ids)], rtol=1e-4, atol=1e-5)
        reference[list(tag_ids)] = 0.0
    torch.testing.assert_close(shard.grad.double(), reference[start : start + size], rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("with_tags", [False, True])
def test_equals_cross_entropy(ranks, with_tags):
    run_ranks(ranks, compare, 19, 30, 7, with_tags)


def test_a_rank_may_hold_nothing_but_padding():
    run_ranks(3, compare, 10, 12, 5, True)


def test_no_scored_tokens():
    """A microbatch of PAD sequences only: an empty answer, and zero gradients."""
    run_ranks(2, compare, 19, 0, 4, True)
