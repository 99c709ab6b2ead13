"""What saving, loading and exporting take on a simulated GPU, up to the files, which are neither written nor read.

The code is that of a run, from the sharded state to the tensors in host memory and back. What is left out is the
comparison of all ranks' shards, which the other ranks' would be needed for. Two things are supposed: data-parallel
ranks hold ranges of the optimizer's state that are as large as this rank's, and a checkpoint that is loaded was saved
at the same parallel layout.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor

from megatron_ssft.parallel.checkpoint.hf import owned_entries, piece_of
from megatron_ssft.parallel.checkpoint.loading import fill
from megatron_ssft.parallel.checkpoint.reader import SharingStrategy
from megatron_ssft.parallel.checkpoint.sharded_state import find_nonfinite, sharded_state
from megatron_ssft.parallel.checkpoint.writer import ThreadsStrategy, on_host
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import fold_forking_rows
from megatron_ssft.parallel.optimizer import ShardedState
from megatron_ssft.parallel.simulated.ledger import Ledger

_RANGES = "param_state"
"""In the optimizer's state: what the distributed optimizer holds, of which no two data-parallel ranks have the same."""


def simulate_save(engine: Engine, *, in_background: bool = False, weights_only: bool = False) -> ShardedState:
    """Bring to the host what this rank writes of a checkpoint, as `run_checkpoint.begin_save` does.

    Returns what of it is no tensor, and what a load begins with.

    Files are written by a thread each. So the largest tensor of every one may be in host memory at the same time.
    """
    find_nonfinite(engine)
    fold_forking_rows(engine.chunks)
    state, common = save_preprocess(sharded_state(engine, is_loading=False, weights_only=weights_only), False)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    _share_out(state, replicas)
    # This rank only plans for itself: metadata of all is made by another, where there is one.
    strategy = ThreadsStrategy(in_background, coordinator=(dist.get_rank() + 1) % dist.get_world_size())
    with tempfile.TemporaryDirectory() as folder:
        strategy.async_save(state, Path(folder))
        assert strategy.writer is not None, "planned"
        content = strategy.writer.content
        largest: list[Tensor] = []
        for tensors in [] if in_background else content:  # else all of it stands in host memory now
            *others, last = sorted(tensors, key=lambda tensor: tensor.nbytes)
            for tensor in others:
                on_host(tensor)  # written, and gone
            largest.append(on_host(last))
    return copy.deepcopy(common)


def simulate_load(engine: Engine, common: ShardedState, staged: Ledger, *, weights_only: bool = False) -> None:
    """Fill the model and the optimizer with what this rank reads and what others send it, as `loading.load_folder`.

    Args:
        common: what of the checkpoint is no tensor.
        staged: told what stands in host memory.
    """
    state = sharded_state(engine, is_loading=True, weights_only=weights_only)
    prepared, others, factories = load_preprocess(state)
    entries, _ = extract_sharded_base(prepared)
    loaded = merge(merge(copy.deepcopy(common), others), _MadeUpFiles(staged).load(entries, Path()))
    fill(engine, Path(), apply_factory_merges(loaded, factories), weights_only)
    find_nonfinite(engine)


def simulate_export(engine: Engine) -> None:
    """Bring to the host what this rank hands over for a Hugging Face folder, as `hf.export_hf_weights` does."""
    fold_forking_rows(engine.chunks)
    for entries in owned_entries(engine).values():
        for entry in entries:
            piece_of(entry)  # sent to the first rank, and gone


class _MadeUpFiles(SharingStrategy):
    """Reads what no file holds, one stored chunk at a time."""

    def __init__(self, staged: Ledger) -> None:
        super().__init__()
        self._staged = staged

    def readers(self, state: ShardedStateDict, group: dist.ProcessGroup) -> dict[object, int]:
        return super().readers(_replicated(state), group)

    def read(self, own: list[ShardedTensor], folder: Path, needed: list[ShardedTensor]) -> None:
        for entry in own:
            assert entry.data is not None, f"{entry.key} has no place to be loaded to"
            data = entry.data.detach()
            chunk = torch.from_numpy(np.zeros(data.nbytes, np.uint8)).view(data.dtype).view(data.shape)
            self._staged.add(chunk)
            data.copy_(chunk)


def _share_out(state: ShardedStateDict, replicas: dist.ProcessGroup) -> None:
    """Decide which replica writes what all of them hold; what this rank alone holds it writes itself."""
    shared = _replicated(state)
    for entry in nested_values(shared):
        entry.replica_id = (*entry.replica_id[:-1], 0)  # as the first of them says it, and so one of them does
    distribution = determine_main_replica_uniform_distribution(shared, replicas)
    distribute_main_replicas_with_precomputed_distribution(shared, replicas, distribution)
    if replicas.size() > 1:
        for entry in nested_values(state.get("optimizer", {}).get(_RANGES, {})):
            entry.replica_id = 0 if is_main_replica(entry.replica_id) else 1


def _replicated(state: ShardedState) -> ShardedState:
    """The state without what only this one of the data-parallel ranks holds."""
    if "optimizer" not in state:
        return state
    return state | {"optimizer": {key: part for key, part in state["optimizer"].items() if key != _RANGES}}
