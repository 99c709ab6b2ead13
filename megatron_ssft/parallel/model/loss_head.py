"""Negative log-likelihood per token without ever holding the logits of a whole microbatch.

T scored places, k targets per place, V vocabulary rows on this tensor-parallel rank, h hidden, N tags. Logits are
formed for a chunk of places at a time (a product in the model's precision, then float32) and formed again in the
backward pass. At 152k vocabulary and 32k tokens full logits would take 28 GiB.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ssft.parallel.device import autocast_type, to_device

CHUNK_TOKENS = 1024


class VocabParallelHead:
    """The output head over this rank's vocabulary shard; it knows the tied tag rows' columns there."""

    def __init__(self, vocab_size: int, shard_size: int, row_ids: tuple[int, ...], tp_group: dist.ProcessGroup) -> None:
        self.tp_group = tp_group
        self.row_ids = row_ids
        self.start = tp_group.rank() * shard_size
        self.shard_size = shard_size
        self.num_valid = min(max(vocab_size - self.start, 0), shard_size)
        """Rows before the padding of the vocabulary; padding gets no probability."""
        owned = [(tag, i - self.start) for tag, i in enumerate(row_ids) if 0 <= i - self.start < shard_size]
        self.has_tags = bool(owned)
        self.tags = torch.tensor([tag for tag, _ in owned], dtype=torch.long)
        self.tag_columns = torch.tensor([column for _, column in owned], dtype=torch.long)

    def nll(self, hidden_Th: Tensor, weight_Vh: Tensor, targets_T: Tensor, tag_rows_Nh: Tensor | None = None) -> Tensor:
        """float32 [T]: -log p(target). With `tag_rows_Nh` these rows stand in for the table's rows of the tags.

        Targets may be [T, k], several tokens of interest at each place; so is the result then.

        hidden's gradient is this rank's share; the caller reduces it over the tensor-parallel group.
        """
        self.move_to(hidden_Th.device)
        targets_Tk = targets_T if targets_T.dim() == 2 else targets_T[:, None]
        return _ChunkedNLL.apply(hidden_Th, weight_Vh, tag_rows_Nh, targets_Tk, self).view_as(targets_T)

    def top(
        self, hidden_Th: Tensor, weight_Vh: Tensor, targets_T: Tensor, tag_rows_Nh: Tensor | None, k: int
    ) -> Tensor:
        """float64 [T, 1 + 2 k], without gradient: NLL of the target, k largest log-probabilities, their token ids.

        `k` is at most the number of vocabulary entries in use.
        """
        self.move_to(hidden_Th.device)
        parts = [hidden_Th.new_empty(0, 1 + 2 * k, dtype=torch.float64)]
        for hidden, targets in zip(hidden_Th.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS)):
            logits = self.logits(hidden, weight_Vh, tag_rows_Nh)
            values, columns = logits.topk(min(k, self.shard_size), dim=-1)
            candidates = torch.stack([values.double(), (columns + self.start).double()])
            gathered = [torch.empty_like(candidates) for _ in range(self.tp_group.size())]
            dist.all_gather(gathered, candidates, group=self.tp_group)
            values, ids = torch.cat(gathered, dim=-1)
            values, order = values.topk(k, dim=-1)
            nll, normalizer = self.nll_of(logits, targets[:, None])
            parts.append(torch.cat([nll.double(), values - normalizer[:, None], ids.gather(-1, order)], dim=-1))
        return torch.cat(parts)

    def nll_of(self, logits: Tensor, targets_tk: Tensor) -> tuple[Tensor, Tensor]:
        """(float32 [t, k], [t]): -log p of the targets and the log of the normaliser; uses up the logits [t, V]."""
        peak = logits.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.tp_group)
        columns, inside = self.local_targets(targets_tk)
        of_targets = logits.gather(1, columns).masked_fill(~inside, 0.0)
        sums = torch.cat([logits.sub_(peak[:, None]).exp_().sum(-1, keepdim=True), of_targets], dim=1)
        dist.all_reduce(sums, group=self.tp_group)
        normalizer = sums[:, 0].log() + peak
        return normalizer[:, None] - sums[:, 1:], normalizer

    def move_to(self, device: torch.device) -> None:
        """Put the indices there."""
        if self.tags.device != device:  # once: an index that comes from the host stalls the stream
            self.tags, self.tag_columns = to_device(self.tags, device), to_device(self.tag_columns, device)

    def logits(self, hidden: Tensor, weight: Tensor, tag_rows: Tensor | None) -> Tensor:
        """float32 [t, V] of a chunk."""
        logits = _product(hidden, weight)
        if tag_rows is not None and self.has_tags:
            logits.index_copy_(1, self.tag_columns, _product(hidden, tag_rows[self.tags]))
        logits[:, self.num_valid :] = -torch.inf
        return logits

    def local_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(column in this shard, whether the target lies in it)."""
        local = targets - self.start
        inside = (local >= 0) & (local < self.shard_size)
        return local.clamp(0, self.shard_size - 1), inside


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 hidden @ weight^T. Logits rounded to bfloat16 first would be off by up to 2^-8 of their size."""
    device, autocast = hidden.device, autocast_type(hidden.device)
    wants_bf16 = hidden.dtype == torch.bfloat16 or torch.is_autocast_enabled(autocast)
    with torch.autocast(autocast, enabled=False):  # which would round the result
        if wants_bf16 and sums_stay_float32(device):
            return torch.mm(hidden.bfloat16(), weight.bfloat16().t(), out_dtype=torch.float32)
        return (hidden.to(weight.dtype) @ weight.t()).float()


@functools.cache
def sums_stay_float32(device: torch.device) -> bool:
    """Whether this torch can hand out a bfloat16 product's float32 sums: on CUDA, from 2.8 on."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, NotImplementedError, TypeError):
        return False


def _subtract(d_tV: Tensor, columns_tk: Tensor, amounts_tk: Tensor) -> None:
    """d[t, columns[t, j]] -= amounts[t, j] for every j, in place. Places may name a column twice.

    CUDA's scatter_add_ adds up in any order. Here what goes to one column is added up first, in order, and written as
    often as the column is named, each time the same.
    """
    if columns_tk.size(1) > 1:
        is_same = columns_tk[:, :, None] == columns_tk[:, None, :]
        amounts_tk = (is_same * amounts_tk[:, None, :]).sum(-1)
    d_tV.scatter_(1, columns_tk, d_tV.gather(1, columns_tk) - amounts_tk)


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's, which holds whatever is put into it
        hidden: Tensor,
        weight: Tensor,
        tag_rows: Tensor | None,
        targets: Tensor,
        head: VocabParallelHead,
    ) -> Tensor:
        parts = [hidden.new_empty(0, targets.size(1), dtype=torch.float32)]
        normalizers = [hidden.new_empty(0, dtype=torch.float32)]
        for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS)):
            nll, normalizer = head.nll_of(head.logits(h, weight, tag_rows), t)
            parts.append(nll)
            normalizers.append(normalizer)
        ctx.save_for_backward(hidden, weight, tag_rows, targets, torch.cat(normalizers))
        ctx.head = head
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tag_rows, targets, normalizer = ctx.saved_tensors
        head: VocabParallelHead = ctx.head
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_tags = None if tag_rows is None else torch.zeros_like(tag_rows, dtype=torch.float32)
        grad_owned = weight.new_zeros(len(head.tags), weight.size(1), dtype=torch.float32)
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            h = hidden[part]
            d = head.logits(h, weight, tag_rows).sub_(normalizer[part, None]).exp_()  # probabilities
            columns, inside = head.local_targets(targets[part])
            d.mul_(grad[part].sum(-1, keepdim=True))
            _subtract(d, columns, grad[part] * inside)
            if tag_rows is not None and head.has_tags:
                d_tags = d.index_select(1, head.tag_columns).to(h.dtype)
                d.index_fill_(1, head.tag_columns, 0.0)
                grad_owned += (d_tags.t() @ h).float()
                grad_hidden[part] += d_tags @ tag_rows[head.tags]
            d = d.to(h.dtype)
            grad_hidden[part] += d @ weight
            grad_weight += d.t() @ h
        if grad_tags is not None:
            grad_tags.index_copy_(0, head.tags, grad_owned)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_tags is None else grad_tags.to(tag_rows.dtype),
            None,
            None,
        )
