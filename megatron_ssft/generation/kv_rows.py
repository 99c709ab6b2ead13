"""Sequences that go through a transformers model together, with their keys and values: fed, copied, dropped.

Shapes: B sequences, L cached places, W new places, V vocabulary. Blocks of different lengths are padded on the left, so
that every sequence's newest token stands in the last place; padding is masked, and positions are explicit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ssft.errors import UserError


class KVRows:
    """B sequences and what the model has computed of them."""

    def __init__(self, model: torch.nn.Module, num_rows: int) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._cache: object | None = None
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
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self._cache is None:
            _check_cache(out.past_key_values)
        self._cache, self.logits = out.past_key_values, out.logits[:, -1]


def _check_cache(cache: object) -> None:
    """Sliding windows count padding, recurrent states take it in: such models need another program."""
    if any(getattr(cache, "is_sliding", ())) or any(getattr(cache, "is_linear", ())):
        raise UserError("--backend hf: made for full attention in every layer; use --backend vllm or openai")
