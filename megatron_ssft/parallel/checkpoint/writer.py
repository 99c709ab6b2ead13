"""Writes megatron-core's checkpoint files from this process.

megatron-core 0.16 forks writer processes even for a synchronous save, and spawns a manager process for their
results. A writer that dies leaves the trainer waiting for ever, a fork of a process full of OpenMP, gloo or NCCL
threads may well die, and the manager costs seconds at the first save. Threads of this process write the files here,
and hash each while the disk still takes it in. That a checkpoint is whole or absent is the work of `run_checkpoint.py`.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ssft.formats.files import sync_path
from megatron_ssft.formats.manifest import FileRecord, record_of

WRITER_THREADS = 2


def save_strategy(written: dict[str, FileRecord]) -> FullyParallelSaveStrategyWrapper:
    """The torch_dist strategy, its writer replaced by threads; data-parallel replicas share the writing.

    `written` is filled with the files that this rank wrote, which are on the disk then.
    """
    filesystem_async._results_queue = queue.SimpleQueue()
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(partial(_write_buckets, written))
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=WRITER_THREADS)
    return FullyParallelSaveStrategyWrapper(
        strategy, parallel_state.get_data_parallel_group(with_context_parallel=True)
    )


def _write_buckets(
    written: dict[str, FileRecord],
    transforms: list,
    use_msc: bool,
    rank: int,
    write_buckets: list,
    global_results_queue: queue.SimpleQueue,
) -> None:
    """Stands in for FileSystemWriterAsync.write_preloaded_data_multiproc; puts {bucket: results}.

    What a write raised (a full disk, say) is put instead: megatron-core then tells all ranks, so that none waits.
    """
    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        write = partial(_write_bucket, written, transforms)
        outcomes = dict(pool.map(write, range(len(write_buckets)), write_buckets))
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    global_results_queue.put(failures[0] if failures else outcomes)


def _write_bucket(
    written: dict[str, FileRecord], transforms: list, index: int, bucket: tuple[str, str, object]
) -> tuple[int, list | Exception]:
    results: queue.SimpleQueue[tuple[int, list | Exception]] = queue.SimpleQueue()
    count: queue.Queue[int] = queue.Queue()
    count.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, results, count, False)
    outcome = results.get()
    if isinstance(outcome[1], Exception):
        return outcome
    path = Path(bucket[0])
    try:
        with ThreadPoolExecutor(1) as syncing:  # the disk is waited for while the processor hashes
            synced = syncing.submit(sync_path, path)
            written[path.name] = record_of(path)
            synced.result()
    except OSError as error:
        return index, error
    return outcome
