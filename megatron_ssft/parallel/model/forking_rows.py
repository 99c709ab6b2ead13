"""The tags' input rows as a parameter of their own, with a learning rate of their own (../optimizer.py).

At fine-tuning learning rates the tags separate only if their rows move faster than the rest of the model. So for
`special` tags the N rows live outside the word embedding, replicated over tensor-parallel ranks, in their own
optimizer group. The word embedding's rows of these ids stand idle meanwhile; `fold` writes the trained rows there
before a checkpoint or an export, `unfold` takes them back.

With tied embeddings the same rows also serve the output head, so tags stay tied like every other token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ssft.parallel.model.marks import mark


class ForkingRows(nn.Module):
    """N rows of width h that replace the word embedding's rows at `row_ids`."""

    ids: Tensor

    def __init__(
        self, config: TransformerConfig, row_ids: tuple[int, ...], tp_group: dist.ProcessGroup, tied_over_stages: bool
    ) -> None:
        super().__init__()
        self.row_ids = row_ids
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (len(row_ids), config.hidden_size)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
        self.register_buffer("ids", torch.tensor(row_ids, device=device), persistent=False)
        # Under sequence parallelism each rank sees its part of the sequence: gradients are summed over ranks.
        mark(self.weight, "sequence_parallel", config.sequence_parallel)
        if tied_over_stages:  # own gradient bucket, so that first and last stage shard it alike
            mark(self.weight, "shared_embedding")

    def forward(self, embeddings: Tensor, input_ids: Tensor) -> Tensor:
        """embeddings [s (or s / tp), b, h] of input_ids [b, s] -> the same with the tags' rows put in."""
        hits = input_ids.t().unsqueeze(-1) == self.ids
        if self.sequence_parallel:
            hits = hits.chunk(self.tp_group.size(), dim=0)[self.tp_group.rank()]
        is_tag, tag = hits.any(-1, keepdim=True), hits.long().argmax(-1)
        return torch.where(is_tag, F.embedding(tag, self.weight), embeddings)

    def for_output_head(self) -> Tensor:
        """The rows as seen by the tied head, with the gradient each tensor-parallel rank must end up with.

        A rank's vocabulary shard holds only some tags, so the head's gradient is partial. Without sequence
        parallelism the input side's gradient is complete on every rank, and the head's is summed here to match;
        with it both are partial and Megatron sums them together.
        """
        if self.sequence_parallel:
            return self.weight
        return tensor_parallel.copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)

    @torch.no_grad()
    def fold(self, table: Tensor) -> None:
        """Write the rows into this rank's shard [v, h] of a vocabulary table, where it owns them."""
        for tag, row in self._owned(table):
            table[row] = self.weight[tag].to(table.dtype)

    @torch.no_grad()
    def unfold(self, table: Tensor) -> None:
        """Take the rows from the shards [v, h] of a vocabulary table. Collective over the tensor-parallel group."""
        rows = torch.zeros_like(self.weight, dtype=torch.float32)
        for tag, row in self._owned(table):
            rows[tag] = table[row].float()
        dist.all_reduce(rows, group=self.tp_group)
        self.weight.copy_(rows)

    def _owned(self, table: Tensor) -> list[tuple[int, int]]:
        """(tag, local row) pairs whose vocabulary row lies in this rank's shard."""
        start = self.tp_group.rank() * table.size(0)
        return [(tag, i - start) for tag, i in enumerate(self.row_ids) if 0 <= i - start < table.size(0)]
