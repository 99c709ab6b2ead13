"""Weights from and to Hugging Face folders, slice by slice and tensor by tensor.

`hf.tensor_map` says which rows of which Hugging Face tensor make up a Megatron tensor; megatron-core's sharded
checkpoint entries say which slice of it this rank holds. Loading reads just these slices, once. Exporting assembles one
Megatron tensor at a time on the first rank and streams it out: this rank's shard plus twice the largest tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_ssft.config import ModelConfig
from megatron_ssft.hf.safetensors_io import HFWeights
from megatron_ssft.hf.safetensors_writer import ShardWriter
from megatron_ssft.hf.tensor_map import Segment, hf_tensors, megatron_tensors, segments, sources
from megatron_ssft.parallel.collectives import gather_json, on_first_rank, raise_together
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import sharded_tensors, take_forking_rows
from megatron_ssft.parallel.topology import Topology

Place = tuple[list[int], list[int]]
"""(offset in the whole tensor, shape) of a slice."""
Owners = dict[tuple[str, "int | None"], list[tuple[int, int, Place]]]
"""(tensor, layer) -> its slices as (rank that has it, number in that rank's list, place)."""


def load_hf_weights(engine: Engine, folder: Path, only_some_layers: bool = False, untie: bool = False) -> None:
    """Fill the engine's weights from a Hugging Face folder. Collective.

    Of ranks that hold the same slice one reads it and sends it to the others, each in its turn: however many replicas
    there are, the folder is read once.

    `only_some_layers`: the engine has fewer layers than the folder, for verification.
    `untie`: the folder's model has tied embeddings, the engine's output head becomes a copy of them.
    Rows that the folder does not have (added tags, padding) become zero; the tags' own rows are taken from the table.

    Raises:
        UserError: tensors are missing, unused, or of another shape.
    """
    model = engine.config.model
    if untie:
        model = dataclasses.replace(model, untie_embeddings_and_output_weights=False)
    if not only_some_layers:
        on_first_rank(lambda: check_hf_names(folder, model), engine.topology)
    with torch.no_grad(), HFWeights(folder) as weights:
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for number, (entry, layer) in enumerate(weight_entries(engine)):
            reader = number % replicas.size()
            if reader == replicas.rank():
                if untie and entry.key == "output_layer.weight":
                    entry = dataclasses.replace(entry, key="embedding.word_embeddings.weight")
                entry.data.zero_()
                for _, local, values in _stored_slices(weights, entry, layer, model):
                    entry.data.narrow(0, local, len(values)).copy_(values)
            if replicas.size() > 1:
                _send_on(entry.data, reader, replicas)
                engine.topology.watch.moved()
    take_forking_rows(engine.chunks)


def _send_on(slice_: Tensor, reader: int, replicas: dist.ProcessGroup) -> None:
    """Fill a slice on all replicas with that of rank `reader` of their group, bit for bit."""
    whole = slice_.contiguous()
    # As bytes, since gloo does not know every type.
    dist.broadcast(whole.view(-1).view(torch.uint8), dist.get_global_rank(replicas, reader), replicas)
    if whole.data_ptr() != slice_.data_ptr():
        slice_.copy_(whole)


def compare_hf_weights(engine: Engine, folder: Path, new_rows: tuple[int, ...] = ()) -> None:
    """Raise UserError naming the first tensor of the folder that is not bitwise what the engine holds. Collective.

    Args:
        new_rows: vocabulary rows that the folder does not have yet, or has spare: tags that were added.
    """
    engine.fold_forking_rows()
    with HFWeights(folder) as weights:
        rows = weights.shapes.get("model.embed_tokens.weight", (0,))[0]
        model = dataclasses.replace(engine.config.model, vocab_size=rows)
        on_first_rank(lambda: check_hf_names(folder, model), engine.topology)
        error = _first_difference(engine, weights, model, new_rows, folder)
    raise_together(error, engine.topology)


def check_hf_names(folder: Path, model: ModelConfig) -> None:
    """Raise UserError unless a folder's tensors are exactly those of this model; reads headers only."""
    with HFWeights(folder) as weights:
        weights.check_names(hf_tensors(model), str(folder))


def _first_difference(
    engine: Engine, weights: HFWeights, model: ModelConfig, new_rows: tuple[int, ...], folder: Path
) -> str | None:
    for entry, layer in weight_entries(engine):
        start = entry.global_offset[entry.prepend_axis_num]
        for name, local, values in _stored_slices(weights, entry, layer, model):
            shard = entry.data.narrow(0, local, len(values)).cpu()
            if layer is None and values.dim() == 2 and new_rows:
                old_rows = [i for i in range(len(values)) if start + local + i not in new_rows]
                shard, values = shard[old_rows], values[old_rows]
            if not torch.equal(shard.to(values.dtype), values):
                distance = float((shard.float() - values.float()).abs().max())
                return f"{folder}: {name} differs from the Megatron weights (largest difference {distance:g})"
    return None


def weight_entries(engine: Engine) -> Iterator[tuple[ShardedTensor, int | None]]:
    """(sharded entry, layer) of every weight on this rank; gate and up come as two entries of one tensor."""
    for chunk in engine.chunks:
        for entry in sharded_tensors(chunk.sharded_state_dict()):
            if "forking_rows" not in entry.key:
                yield entry, (entry.global_offset[0] if entry.prepend_axis_num else None)


def _stored_slices(
    weights: HFWeights, entry: ShardedTensor, layer: int | None, model: ModelConfig
) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor name, row of this rank's shard where it begins, values) of what the folder holds of a shard."""
    lead = entry.prepend_axis_num
    offset, shape = entry.global_offset[lead:], entry.local_shape
    columns = slice(offset[1], offset[1] + shape[1]) if len(shape) == 2 else None
    for name, rows, local in sources(entry.key, layer, model, range(offset[0], offset[0] + shape[0])):
        yield name, local, weights.read(name, rows, columns)


def export_hf_weights(engine: Engine, folder: Path) -> None:
    """Write the engine's weights as safetensors shards with their index into `folder`, which exists. Collective.

    Raises:
        UserError: the disk is full or not writable.
    """
    engine.fold_forking_rows()
    topology = engine.topology
    model = dataclasses.replace(engine.config.model, vocab_size=engine.vocab_size)
    own_entries = owned_entries(engine)
    owners = _find_owners(own_entries, topology)
    dtype = next(engine.chunks[0].parameters()).dtype
    writer = None
    if topology.is_first_rank:
        writer = ShardWriter(folder, [(name, dtype, shape) for name, shape in hf_tensors(model).items()])
    for tensor in megatron_tensors(model):
        whole = torch.empty(tensor.shape, dtype=dtype) if topology.is_first_rank else None
        for rank, i, place in owners[tensor.key, tensor.layer]:
            piece = None
            if topology.rank == rank:
                piece = piece_of(own_entries[tensor.key, tensor.layer][i])
            piece = _deliver(piece, rank, place, dtype, topology)
            if whole is not None and piece is not None:
                _insert(piece, place, whole)
        if writer is not None and whole is not None:
            _write(writer, whole, segments(tensor.key, tensor.layer, model), hf_tensors(model))
    if writer is not None:
        writer.finish()


def owned_entries(engine: Engine) -> dict[tuple[str, int | None], list[ShardedTensor]]:
    """(tensor, layer) -> the slices that this rank hands over: each slice has one owner among its replicas."""
    entries: dict[tuple[str, int | None], list[ShardedTensor]] = {}
    for entry, layer in weight_entries(engine):
        replica = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
        if not any(replica):
            entries.setdefault((entry.key, layer), []).append(entry)
    return entries


def piece_of(entry: ShardedTensor) -> Tensor:
    """A slice of this rank in host memory."""
    piece: Tensor = entry.data.detach().cpu().contiguous()
    return piece


def _find_owners(own_entries: dict[tuple[str, int | None], list[ShardedTensor]], topology: Topology) -> Owners:
    """Tell every rank who owns which slices. Collective."""
    listed = [(key, layer, [_place(entry) for entry in entries]) for (key, layer), entries in own_entries.items()]
    owners: Owners = {}
    for rank, rows in enumerate(gather_json(listed, topology)):
        for key, layer, places in rows:
            owners.setdefault((key, layer), []).extend((rank, i, place) for i, place in enumerate(places))
    return owners


def _place(entry: ShardedTensor) -> Place:
    return list(entry.global_offset[entry.prepend_axis_num :]), list(entry.local_shape)


def _deliver(piece: Tensor | None, source: int, place: Place, dtype: torch.dtype, topology: Topology) -> Tensor | None:
    """Bring one slice from its owner to the first rank; None on every other rank."""
    if source == 0:
        return piece
    if topology.rank == source:
        assert piece is not None, "the owner has the slice"
        topology.control_group.send(piece, 0)
    elif topology.is_first_rank:
        received = torch.empty(place[1], dtype=dtype)
        topology.control_group.receive(received, source)
        return received
    return None


def _insert(piece: Tensor, place: Place, whole: Tensor) -> None:
    """Copy one slice into its tensor, padding of the vocabulary left out."""
    offset, shape = place
    rows = max(0, min(shape[0], whole.size(0) - offset[0]))
    target = whole.narrow(0, min(offset[0], whole.size(0)), rows)
    if len(shape) == 2:
        target = target.narrow(1, offset[1], shape[1])
    target.copy_(piece[:rows])


def _write(writer: ShardWriter, whole: Tensor, parts: tuple[Segment, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """Split one Megatron tensor into its Hugging Face tensors and stream them out."""
    for name in dict.fromkeys(part.name for part in parts):
        own = [part for part in parts if part.name == name]
        if len(own) == 1:
            writer.write(name, whole[own[0].start : own[0].stop])
            continue
        tensor = torch.empty(shapes[name], dtype=whole.dtype)
        for part in own:
            tensor[part.hf_start : part.hf_start + part.stop - part.start] = whole[part.start : part.stop]
        writer.write(name, tensor)
