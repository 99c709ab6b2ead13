"""Sequences that go through a transformers model together, with their keys and values: fed, copied, dropped.

Shapes: B sequences, L cached places, W new places, V vocabulary. Blocks of different lengths are padded on the left, so
that every sequence's newest token stands in the last place; padding is masked, and positions are explicit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megatron_ssft.errors import UserError


class Cache(Protocol):
    """The part of transformers' cache that is used here."""

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class KVRows:
    """B sequences and what the model has computed of them."""

    def __init__(self, model: torch.nn.Module, num_rows: int) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._cache_name = cache_name(model.forward)
        self._cache: Cache | None = None
        self._mask = torch.ones(num_rows, 0, dtype=torch.long, device=self._device)  # [B, L]: 0 for padding
        self._lengths = torch.zeros(num_rows, dtype=torch.long, device=self._device)  # [B], padding not counted
        self._padded = False
        self.logits = torch.empty(num_rows, 0, device=self._device)
        """[B, V]: of what follows each sequence."""

    def feed(self, blocks: Sequence[Sequence[int]]) -> None:
        """Append to every sequence its block of ids. Raises UserError for models that padding would disturb."""
        width = max(map(len, blocks))
        if width == 0:
            return
        block_lengths = torch.tensor([len(block) for block in blocks])
        ids = torch.tensor([[0] * (width - len(block)) + list(block) for block in blocks])
        filled = torch.arange(width) >= width - block_lengths[:, None]
        previous = self.logits
        self._forward(ids.to(self._device), filled.to(self._device), bool(filled.all()))
        if not block_lengths.all():
            empty = (block_lengths == 0).to(self._device)[:, None]
            self.logits = torch.where(empty, previous, self.logits)

    def append(self, tokens: torch.Tensor) -> None:
        """Append to every sequence its token, int64 [B]."""
        self._forward(tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.bool), True)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these sequences; one may be named several times."""
        if list(rows) == list(range(len(self._lengths))):
            return
        index = torch.tensor(rows, device=self._device)
        self._mask, self._lengths, self.logits = self._mask[index], self._lengths[index], self.logits[index]
        if self._cache is not None:
            self._cache.batch_select_indices(index)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, filled: torch.Tensor, full: bool) -> None:
        """Feed `ids` [B, W], of which `filled` are no padding (`full`: all)."""
        self._mask = torch.cat([self._mask, filled.long()], dim=1)
        self._padded = self._padded or not full
        # The last place of a block has the highest position; padding takes the one of the first token.
        positions = self._lengths[:, None] + (filled.cumsum(dim=1) - 1).clamp(min=0)
        self._lengths = self._lengths + filled.sum(dim=1)
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask if self._padded else None,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
        )
        cache: Cache = getattr(out, self._cache_name)
        if self._cache is None:
            _check_cache(cache)
        self._cache, self.logits = cache, out.logits[:, -1]


def cache_name(forward: Callable[..., object]) -> str:
    """The name of the cache in a model's `forward` and in its output: `cache`, or `past_key_values` in the past.

    The signature decides, because models change one by one. transformers 5.24 renamed it in most, warns about the old
    name, and will take it no more from 5.40.
    """
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _check_cache(cache: Cache) -> None:
    """Sliding windows count padding, recurrent states take it in: such models need another program."""
    if any(getattr(cache, "is_sliding", ())) or any(getattr(cache, "is_linear", ())):
        raise UserError("--backend hf: made for full attention in every layer; use --backend vllm or openai")
