"""Initial weights that do not depend on the parallel layout.

Every parameter is drawn by its global name: the generator is seeded by (seed, name, layer), draws the whole tensor on
the CPU, and each rank keeps the slice its sharded checkpoint entry describes. So TP, PP, virtual pipeline and the
number of data-parallel ranks never change where training starts.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_ssft.config import RunConfig, StartConfig
from megatron_ssft.parallel.model.gpt import SetGPTModel
from megatron_ssft.seeded import text_digest, whole_number
from megatron_ssft.tokenizers.vocabulary import Vocabulary


@torch.no_grad()
def initialize_weights(chunks: list[SetGPTModel], config: RunConfig) -> None:
    """Draw every weight matrix: N(0, std), the projections back into the residual stream N(0, std / sqrt(2 layers)).

    Biases are zero; norms keep the ones their modules are built with.
    """
    std = config.model.init_method_std
    back = std / math.sqrt(2.0 * config.model.num_layers)
    for chunk in chunks:
        for entry in sharded_tensors(chunk.sharded_state_dict()):
            if entry.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
                _draw(entry, back, config.training.seed)
            elif len(entry.global_shape) - entry.prepend_axis_num == 2:
                _draw(entry, std, config.training.seed)
            elif entry.key.endswith("bias"):
                entry.data.zero_()  # megatron-core leaves them unwritten when it does not initialise


def sharded_tensors(state: dict[str, object]) -> list[ShardedTensor]:
    """List all tensor entries; factories (gate and up of SwiGLU) give theirs, which are views of the parameter."""
    entries = []
    for value in state.values():
        if isinstance(value, ShardedTensorFactory):
            entries += value.build()
        elif isinstance(value, ShardedTensor):
            entries.append(value)
    return entries


@torch.no_grad()
def _draw(entry: ShardedTensor, std: float, seed: int) -> None:
    lead = entry.prepend_axis_num
    values = torch.randn(
        entry.global_shape[lead:], generator=named_generator(seed, entry.key, *entry.global_offset[:lead])
    )
    for axis, (offset, size) in enumerate(zip(entry.global_offset[lead:], entry.local_shape)):
        values = values.narrow(axis, offset, size)
    entry.data.copy_(values * std)


def named_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments."""
    return torch.Generator().manual_seed(whole_number(text_digest(seed, *names), bits=63, byteorder="little"))


@torch.no_grad()
def initialize_forking_rows(chunks: list[SetGPTModel], vocabulary: Vocabulary, start: StartConfig, seed: int) -> None:
    """Give the new tags' rows of every vocabulary table their start, as --forking-token-init says.

    Mean and RMS are over the rows that come with a meaning (a model may have spare rows that were never trained). Tags
    among them keep the rows they have. Other tokens without a row begin as tags do by default: at the mean, with noise.

    Args:
        vocabulary: the tags, the rows that come with a meaning, and the row to start from with `copy:<token>`.
        seed: decides the noise.
    """
    new_tags = tuple(i for i in vocabulary.tags.row_ids if i >= vocabulary.known_rows)
    new_tokens = vocabulary.ids_without_row
    if not new_tags and not new_tokens:
        return
    noise = start.forking_token_noise if start.forking_token_init != "mean" else 0.0
    for chunk in chunks:
        tp_group = chunk.pg_collection.tp
        for table in chunk.vocab_tables():
            base, rms = _statistics(table, tp_group, vocabulary.known_rows, vocabulary.copy_id)
            tags = _drawn_rows(base, rms, len(new_tags), named_generator(seed, "forking rows"), noise)
            base, rms = _statistics(table, tp_group, vocabulary.known_rows, None)
            default = StartConfig().forking_token_noise
            tokens = _drawn_rows(base, rms, len(new_tokens), named_generator(seed, "token rows"), default)
            first = tp_group.rank() * table.size(0)
            for row, i in zip([*tags, *tokens], [*new_tags, *new_tokens]):
                if 0 <= i - first < table.size(0):
                    table[i - first] = row.to(table.dtype)
    take_forking_rows(chunks)


def _statistics(
    table: Tensor, tp_group: dist.ProcessGroup, known_rows: int, copy_id: int | None
) -> tuple[Tensor, Tensor]:
    """Where new rows start, float32 [h], and the RMS of the known rows, float32; equal on all ranks. Collective.

    Args:
        copy_id: the row to start from; None: the mean of the known rows.
    """
    first = tp_group.rank() * table.size(0)
    ids = torch.arange(first, first + table.size(0), device=table.device)
    in_use = ids < known_rows
    used = table[in_use].double()
    base = table[ids == copy_id].double().sum(0) if copy_id is not None else used.sum(0)
    totals = torch.cat([base, used.square().sum().view(1), in_use.sum().double().view(1)])
    dist.all_reduce(totals, group=tp_group)
    base, squares, count = totals[:-2], totals[-2], totals[-1]
    if copy_id is None:
        base = base / count
    return base.float(), (squares / (count * table.size(1))).sqrt().float()


def _drawn_rows(base: Tensor, rms: Tensor, num_rows: int, generator: torch.Generator, noise: float) -> Tensor:
    """float32 [num_rows, h]: `base` with noise of `noise` times the RMS."""
    rows = base.repeat(num_rows, 1)
    if noise:
        rows += torch.randn(rows.shape, generator=generator).to(rows.device) * rms * noise
    return rows


def take_forking_rows(chunks: list[SetGPTModel]) -> None:
    """Fill the tags' own rows from the vocabulary tables they are folded into."""
    for chunk in chunks:
        if chunk.forking_rows is not None:
            chunk.forking_rows.unfold(chunk.vocab_tables()[0])


def fold_forking_rows(chunks: list[SetGPTModel]) -> None:
    """Write the tags' own rows into the vocabulary tables they stand for."""
    for chunk in chunks:
        if chunk.forking_rows is not None:
            chunk.forking_rows.fold(chunk.vocab_tables()[0])
