"""The chunked vocabulary-parallel head against plain log-softmax over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_ssft.parallel.model import loss_head
from megatron_ssft.parallel.model.loss_head import VocabParallelHead
from tests.helpers.distributed import run_ranks

HIDDEN, PADDED = 8, 24


def compare(vocab_size, tokens, chunk, with_tags, targets_a_place=None):
    dist.init_process_group("gloo")
    loss_head.CHUNK_TOKENS = chunk
    group = dist.group.WORLD
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=draw)
    table = torch.randn(PADDED, HIDDEN, generator=draw) * 3
    shape = (tokens,) if targets_a_place is None else (tokens, targets_a_place)
    targets = torch.randint(vocab_size, shape, generator=draw)  # several of a place may be the same
    weights = torch.rand(shape, generator=draw)
    tag_ids = (1, vocab_size - 1, vocab_size // 2) if with_tags else ()
    rows = torch.randn(len(tag_ids), HIDDEN, generator=draw) if with_tags else None

    whole = table.clone()
    if with_tags:
        whole[list(tag_ids)] = rows
    whole = whole[:vocab_size].double().requires_grad_()
    wide = hidden.double().requires_grad_()
    log_p = (wide @ whole.T).log_softmax(-1)
    expected = -log_p.gather(1, targets.view(tokens, targets_a_place or 1)).view(shape)
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


@pytest.mark.parametrize(("ranks", "with_tags"), [(1, True), (2, False), (3, True)])
def test_several_targets_of_a_place(ranks, with_tags):
    run_ranks(ranks, compare, 19, 30, 7, with_tags, 5)


def test_no_places_with_several_targets():
    run_ranks(2, compare, 19, 0, 4, True, 5)


def compare_top(vocab_size, tokens, chunk, with_tags, k):
    dist.init_process_group("gloo")
    loss_head.CHUNK_TOKENS = chunk
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=draw)
    table = torch.randn(PADDED, HIDDEN, generator=draw) * 3
    table[vocab_size:] = hidden[0] * 100 if tokens else 0.0  # padding that would win
    targets = torch.randint(vocab_size, (tokens,), generator=draw)
    tag_ids = (1, vocab_size - 1, vocab_size // 2) if with_tags else ()
    rows = torch.randn(len(tag_ids), HIDDEN, generator=draw) * 3 if with_tags else None
    whole = table.clone()
    if with_tags:
        whole[list(tag_ids)] = rows
    log_p = (hidden.double() @ whole[:vocab_size].double().T).log_softmax(-1)
    size = PADDED // dist.get_world_size()
    shard = table[dist.get_rank() * size :][:size].clone()
    head = VocabParallelHead(vocab_size, size, tag_ids, dist.group.WORLD)
    answer = head.top(hidden, shard, targets, rows, k)
    assert answer.dtype == torch.float64 and answer.shape == (tokens, 1 + 2 * k)
    nll, values, ids = answer[:, 0], answer[:, 1 : 1 + k], answer[:, 1 + k :].long()
    torch.testing.assert_close(nll, -log_p.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    best = log_p.topk(k, dim=-1)
    torch.testing.assert_close(values, best.values, rtol=1e-5, atol=1e-5)
    assert (ids == best.indices).all()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "vocab_size", "with_tags", "k"),
    [(1, 19, True, 4), (2, 19, False, 4), (2, 19, True, 19), (3, 19, True, 12), (3, 10, False, 10), (3, 24, True, 1)],
)
def test_most_probable_tokens(ranks, vocab_size, with_tags, k):
    """Also more of them than a shard has rows, and all there are."""
    run_ranks(ranks, compare_top, vocab_size, 30, 7, with_tags, k)


def test_most_probable_tokens_of_no_places():
    run_ranks(2, compare_top, 19, 0, 4, True, 3)
