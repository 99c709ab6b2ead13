"""Writes megatron-core's checkpoint files from this process.

megatron-core 0.16 forks writer processes even for a synchronous save, and spawns a manager process for their
results. A writer that dies leaves the trainer waiting for ever, a fork of a process full of OpenMP, gloo or NCCL
threads may well die, and the manager costs seconds at the first save. Threads of this process write the files here,
and hash each while the disk still takes it in. That a checkpoint is whole or absent is the work of `run_checkpoint.py`.

Tensors go to the host one at a time as they are written, or all at once before (`is_copied`), so that training may
change them meanwhile.
"""

from __future__ import annotations

import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ssft.formats.files import naming, sync_path
from megatron_ssft.formats.manifest import FileRecord, record_of
from megatron_ssft.parallel.checkpoint.pickle_scan import BACKENDS
from megatron_ssft.parallel.device import is_gpu

WRITER_THREADS = 2
_SERIALIZATION = (
    {"serialization_format": filesystem.SerializationFormat.TORCH_SAVE}
    if "serialization_format" in inspect.signature(filesystem._write_item).parameters
    else {}
)
"""Named by newer versions of torch; the others know no other."""


def plan_save(state: ShardedStateDict, folder: Path, *, is_copied: bool) -> ThreadsWriter:
    """Share the writing out over ranks, data-parallel replicas too. Collective.

    Args:
        is_copied: copy everything to the host before anything is written.
    """
    strategy = ThreadsStrategy(is_copied)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    FullyParallelSaveStrategyWrapper(strategy, replicas).async_save(state, folder)
    assert strategy.writer is not None, "planned"
    return strategy.writer


class ThreadsStrategy(TorchDistSaveShardedStrategy):
    """The torch_dist strategy, its writer replaced by threads."""

    def __init__(self, is_copied: bool, coordinator: int = 0) -> None:
        """
        Args:
            is_copied: copy everything to the host before anything is written.
            coordinator: the rank that makes the metadata of all ranks' plans.
        """
        super().__init__(BACKENDS["sharded_backend"], BACKENDS["sharded_backend_version"], thread_count=WRITER_THREADS)
        self._is_copied = is_copied
        self._coordinator = coordinator
        self.writer: ThreadsWriter | None = None

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, async_strategy: str = "") -> None:
        """Plan the save, collectively; `writer` does it. megatron-core passes on a strategy since 0.17."""
        by_key, _, _ = torch_strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        writer = ThreadsWriter(checkpoint_dir, self._is_copied)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        tensors = torch_strategies.mcore_to_pyt_state_dict(by_key, False)
        (_, writer.metadata, _), *_ = save_state_dict_async_plan(
            tensors, writer, None, self._coordinator, planner=planner
        )
        self.writer = writer


class ThreadsWriter(FileSystemWriterAsync):
    """Writes this rank's items into as many files as there are threads."""

    def __init__(self, folder: Path, is_copied: bool) -> None:
        super().__init__(folder, thread_count=WRITER_THREADS)
        self.metadata: Metadata | None = None
        """Of the whole checkpoint, on the first rank."""
        self.written: dict[str, FileRecord] = {}
        """The files that this rank wrote, which are on the disk."""
        self.failure: OSError | RuntimeError | None = None
        """What kept this rank from writing: a full disk, say. torch's writer of archives raises RuntimeErrors."""
        self._is_copied = is_copied
        self._files: list[tuple[Path, list[tuple[WriteItem, Tensor]]]] = []
        self._results: list[WriteResult] = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Share the items out over files, and copy them to the host where that is asked for."""
        prefix = plan.storage_data.prefix
        for items in _split_by_size_and_type(WRITER_THREADS, plan.items):
            if items:
                path = Path(self.checkpoint_dir, f"{prefix}{len(self._files)}{filesystem.DEFAULT_SUFFIX}")
                data = [planner.resolve_data(item) for item in items]
                tensors = [tensor.detach() for tensor in data if isinstance(tensor, Tensor)]
                assert len(tensors) == len(items), "a checkpoint of ours holds tensors only"
                if self._is_copied:
                    tensors = [_copy_on_host(tensor) for tensor in tensors]
                self._files.append((path, list(zip(items, tensors))))

    @property
    def content(self) -> list[list[Tensor]]:
        """The tensors of each file, which are written one after the other, and files at the same time."""
        return [[tensor for _, tensor in items] for _, items in self._files]

    def write(self) -> None:
        """Write all files, or say in `failure` why not."""
        try:
            with ThreadPoolExecutor(WRITER_THREADS) as pool:
                self._results = [result for results in pool.map(self._write_file, self._files) for result in results]
        except (OSError, RuntimeError) as error:
            self.failure = error
        self._files = []  # the copies with them

    def _write_file(self, file: tuple[Path, list[tuple[WriteItem, Tensor]]]) -> list[WriteResult]:
        path, content = file
        results = []
        with naming(path), open(path, "wb") as stream:
            for item, tensor in content:
                whole = tensor if self._is_copied else on_host(tensor)
                results.append(
                    filesystem._write_item(self.transforms, stream, whole, item, path.name, **_SERIALIZATION)
                )
                del whole  # before the next one is copied
        with ThreadPoolExecutor(1) as syncing:  # the disk is waited for while the processor hashes
            synced = syncing.submit(sync_path, path)
            self.written[path.name] = record_of(path)
            synced.result()
        return results

    def gather_results(self) -> list[list[WriteResult]]:
        """What each rank wrote, on the first rank; empty elsewhere. Collective."""
        is_first = dist.get_rank() == 0
        gathered: list[list[WriteResult]] = [[] for _ in range(dist.get_world_size())] if is_first else []
        dist.gather_object(self._results, gathered if is_first else None)
        return gathered

    def write_metadata(self, results: list[list[WriteResult]]) -> None:
        """Write what says where each tensor lies; for the first rank. Raises OSError."""
        assert self.metadata is not None, "the first rank has it"
        self.finish(self.metadata, results)
        (Path(self.checkpoint_dir) / CONFIG_FNAME).write_text(json.dumps(BACKENDS), encoding="utf-8")


def _copy_on_host(tensor: Tensor) -> Tensor:
    """A copy of its own, in host memory."""
    return tensor.cpu() if is_gpu(tensor.device) else tensor.clone(memory_format=torch.contiguous_format)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory, alone in its storage, as all of a storage is written."""
    is_alone = not is_gpu(tensor.device) and tensor.untyped_storage().size() == tensor.numel() * tensor.itemsize
    return tensor if is_alone else _copy_on_host(tensor)
