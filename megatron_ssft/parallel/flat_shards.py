"""Optimizer state that the distributed optimizer cuts into flat ranges, as parts of whole tensors.

A data-parallel rank holds the range [start, end) of a parameter's elements in row-major order. Such a range is a few
boxes: the rest of a row, whole rows, the beginning of a row. Each box is contiguous in the range. So a rank saves and
loads what it holds, without a copy and without the other ranks, and the checkpoint holds tensors of the model's own
shapes, which load at any parallel layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_PREFIX = "optimizer.state"
_COUNT = "step"
"""Stored once, with the parameter groups."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor with sides along its axes."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]


def cut_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Boxes that hold the elements [start, end) of a tensor in row-major order, in this order, each contiguous."""
    if start >= end:
        return
    if end - start == math.prod(shape):
        yield Box((0,) * len(shape), shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # inside one row
        yield from _in_row(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, end: int) -> Iterator[Box]:
    for box in cut_range(shape[1:], start, end):
        yield Box((row, *box.offset), (1, *box.sizes))


def flat_states(optimizer: DistributedOptimizer) -> list[tuple[torch.nn.Parameter, int, dict[str, Tensor]]]:
    """(parameter, start of this rank's range in it, name -> the range's float32 values) of all that this rank holds.

    The names are megatron-core's: `param` for the weights, `exp_avg`, `exp_avg_sq`.
    """
    states = []
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                    held = {name: tensor.detach() for name, tensor in tensors.items() if name != _COUNT}
                    states.append((parameter, ranges["param"].start, held))
    return states


def sharded_flat_states(
    optimizer: DistributedOptimizer, model: Mapping[str, object]
) -> dict[int, dict[int, ShardedTensor]]:
    """What this rank holds of the state as megatron-core's sharded tensors, which share its memory.

    Args:
        model: the model's own sharded tensors, which say where each parameter lies in the whole.
    """
    entries = {entry.data: entry for entry in nested_values(model) if hasattr(entry, "replica_id")}
    shards = {}
    for number, (parameter, start, held) in enumerate(flat_states(optimizer)):
        pieces = (
            piece
            for name, values in held.items()
            for part in _parts(entries[parameter])
            for piece in _pieces(part, parameter, start, name, values.view(-1), optimizer)
        )
        shards[number] = dict(enumerate(pieces))
    return shards


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors of the checkpoint that a parameter is made of: gate and up projection are two."""
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _pieces(
    part: ShardedTensor,
    parameter: torch.nn.Parameter,
    start: int,
    name: str,
    values: Tensor,
    optimizer: DistributedOptimizer,
) -> Iterator[ShardedTensor]:
    """The boxes of one tensor of the checkpoint that a flat range holds; `values`: the range, from `start` on."""
    data = part.data
    assert data is not None and data.is_contiguous(), f"{part.key} is no contiguous part of its parameter"
    begin = data.storage_offset() - parameter.storage_offset()
    first = max(start, begin)
    place = first - start
    lead = part.prepend_axis_num
    for box in cut_range(tuple(data.shape), first - begin, min(start + len(values), begin + data.numel()) - begin):
        count = math.prod(box.sizes)
        shape = (1,) * lead + box.sizes
        inner = zip(part.global_offset[lead:], box.offset)
        yield ShardedTensor(
            key=f"{_PREFIX}.{name}.{part.key}",
            data=values[place : place + count].view(shape),
            dtype=values.dtype,
            local_shape=shape,
            global_shape=part.global_shape,
            global_offset=(*part.global_offset[:lead], *(outer + own for outer, own in inner)),
            axis_fragmentations=None,  # no regular grid
            # Data-parallel ranks hold different ranges; tensor-parallel ones may hold the same.
            replica_id=(*part.replica_id[:2], optimizer.distributed_optimizer_instance_id),
            allow_shape_mismatch=part.allow_shape_mismatch,
        )
        place += count
