"""Reads megatron-core's checkpoint files: every tensor once per replica, and every stored chunk once per rank.

Data-parallel replicas hold the same weights. Each reads a share of them and broadcasts it to the others. Of the
distributed optimizer's state each rank holds, and reads, a share of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future


class SharingStrategy(TorchDistLoadShardedStrategy):
    """Fills the tensors of a sharded state where they are; replicas share the reading."""

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, async_strategy: str = "") -> StateDict:
        """Load, collectively. Raises torch's CheckpointException, on all ranks, where one cannot read its share.

        megatron-core passes on a strategy of saving since 0.17.
        """
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        entries = [entry for entry in nested_values(sharded_state_dict) if isinstance(entry, ShardedTensor)]
        shared = self.readers(sharded_state_dict, group)
        own = [entry for entry in entries if shared.get(_sharded_tensor_shard_id(entry), group.rank()) == group.rank()]
        self.read(own, checkpoint_dir, entries)
        for entry in entries:  # in one order on all ranks of the group, whose parts of the model are the same
            reader = shared.get(_sharded_tensor_shard_id(entry))
            if reader is not None:
                assert entry.data is not None, f"{entry.key} has no place to be loaded to"
                dist.broadcast(entry.data.detach(), src=dist.get_global_rank(group, reader), group=group)
        return _values(sharded_state_dict)

    def readers(self, state: ShardedStateDict, group: dist.ProcessGroup) -> dict[object, int]:
        """Rank in the group that reads, by shard, of those that more than one rank of it needs. Collective."""
        distribution = determine_main_replica_uniform_distribution(state, group, True)
        if distribution is None:
            return {}
        return {
            shard: reader
            for shard, reader in distribution.main_rank_for_shard.items()
            if len(distribution.all_ranks_for_shard[shard]) > 1
        }

    def read(self, own: list[ShardedTensor], folder: Path, needed: list[ShardedTensor]) -> None:
        """Read these tensors, collectively.

        `needed`: the names and shapes of all are compared with the checkpoint's.
        """
        by_key: dict[str, list[ShardedTensor]] = {}
        for entry in own:
            by_key.setdefault(entry.key, []).append(entry)
        flexible = {entry.key: entry for entry in own if entry.allow_shape_mismatch}
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[entry for entry in needed if not entry.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors=flexible,
        )
        checkpoint.load_state_dict(
            torch_strategies.mcore_to_pyt_state_dict(by_key, True),
            _ChunkReader(folder),
            planner=planner,
        )


def _values(state: object) -> object:
    """The same nested containers with tensors in the place of their descriptions."""
    if isinstance(state, dict):
        return {key: _values(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_values(value) for value in state]
    if isinstance(state, ShardedTensor):
        assert state.data is not None, f"{state.key} has no place to be loaded to"
        return state.data.detach().view(state.local_shape)
    return state


class _ChunkReader(FileSystemReader):
    """Reads a stored chunk once, however many parts of it are asked for, and holds one at a time."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every item of the plan to its place."""
        places = {item.storage_index: self.storage_data[item.storage_index] for item in plan.items}
        items = sorted(plan.items, key=lambda item: (places[item.storage_index].relative_path,
                                                     places[item.storage_index].offset))  # fmt: skip
        before, chunk = None, torch.empty(0)
        for item in items:
            if item.storage_index != before:
                del chunk
                before, chunk = item.storage_index, self._chunk(item)
            _copy(chunk, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, item: ReadItem) -> Tensor:
        place = self.storage_data[item.storage_index]
        with self.fs.create_stream(self.fs.concat_path(self.path, place.relative_path), "rb") as stream:
            chunk: Tensor = torch.load(self._slice_file(stream, place), map_location="cpu", weights_only=True)
        return chunk


def _copy(chunk: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    part = chunk[tuple(slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths))]
    target = planner.resolve_tensor(item).detach()
    if target.size() != part.size():
        raise AssertionError(f"{item.storage_index}: {tuple(part.size())} are stored, {tuple(target.size())} needed")
    target.copy_(part)
    planner.commit_tensor(item, target)
