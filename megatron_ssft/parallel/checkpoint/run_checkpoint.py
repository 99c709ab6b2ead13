"""Atomic checkpoints in megatron-core's distributed format: complete or absent, loadable at any parallel layout.

A run folder holds `iter_0000010/` and so on, and `latest_checkpointed_iteration.txt`. A checkpoint is written under
a temporary name and renamed when everything is on disk, so a folder `iter_*` is always complete. Our own state is
JSON; megatron-core's pickles are scanned before they are opened.

The files may be written in the background, from a copy. Every collective stays on the main thread: planning at the
beginning, publishing at the end.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from msgspec import structs

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import naming, publish_folder, write_durably
from megatron_ssft.formats.jsonl import to_object
from megatron_ssft.formats.manifest import seal
from megatron_ssft.formats.run_folder import STATE, TRACKER, checkpoint_folder
from megatron_ssft.formats.train_state import WeightsState, encode_state
from megatron_ssft.parallel.checkpoint.sharded_state import (
    find_nonfinite,
    refuse_nonfinite,
    sharded_state,
)
from megatron_ssft.parallel.checkpoint.shards import WrittenShards, complete_shards
from megatron_ssft.parallel.checkpoint.writer import ThreadsWriter, plan_save
from megatron_ssft.parallel.collectives import gather_json, on_first_rank, raise_together
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import Topology

_NEARLY_FULL_BYTES = 1 << 20


def save_checkpoint(engine: Engine, run: Path, iteration: int, state: WeightsState) -> Path:
    """Write weights, optimizer (where `state` says that there is one) and `state`. Collective; returns the folder.

    Raises:
        UserError: weights or optimizer state are not finite, the disk is full, or not all ranks write into one folder;
            nothing is published then.
    """
    return begin_save(engine, run, iteration, state).finish()


def begin_save(
    engine: Engine, run: Path, iteration: int, state: WeightsState, *, in_background: bool = False
) -> CheckpointSave:
    """Write the files of a checkpoint, or let a thread write them from a copy. Collective; `finish` publishes it.

    Raises UserError as `save_checkpoint`.
    """
    folder, topology = checkpoint_folder(run, iteration), engine.topology

    def prepare() -> str:
        # A name of its own: should two jobs write here in spite of the lease, neither publishes the other's shards.
        run.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=run))
        made.chmod(0o755)  # mkdtemp keeps others out
        return str(made)

    if in_background:
        refuse_nonfinite(find_nonfinite(engine), f"{folder}: is not saved", topology)
    partial = Path(on_first_rank(prepare, topology))
    weights_only = not (engine.is_started and state.has_optimizer)
    with _removing(partial):
        engine.fold_forking_rows()
        with ThreadPoolExecutor(1) as looking:  # while the disk is waited for
            damage = None if in_background else looking.submit(find_nonfinite, engine)
            writing = _write_shards(engine, partial, weights_only, in_background)
        if damage is not None:
            refuse_nonfinite(damage.result(), f"{folder}: is not saved", topology)
    text = encode_state(structs.replace(state, has_manifest=True))
    return CheckpointSave(folder, iteration, partial, text, writing, topology)


class CheckpointSave:
    """A checkpoint that is being written."""

    def __init__(
        self, folder: Path, iteration: int, partial: Path, state: str, writing: Writing, topology: Topology
    ) -> None:
        self.folder = folder
        self.iteration = iteration
        self._partial = partial
        self._state = state
        self._writing = writing
        self._topology = topology

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are written, or cannot be."""
        return self._writing.is_over

    def finish(self) -> Path:
        """Wait for the files of all ranks, and publish the checkpoint. Collective; returns the folder.

        Raises UserError where one could not be written; nothing is published then.
        """
        run = self.folder.parent
        with _removing(self._partial):
            shards = _gather_shards(self._writing, self._partial, self._topology)
            results = self._writing.writer.gather_results()

            def publish() -> None:
                self._writing.store_common(self._partial / COMMON_STATE_FNAME)
                self._writing.writer.write_metadata(results)
                write_durably(self._partial / STATE, self._state)
                seal(self._partial, complete_shards(self._partial, shards))
                # The folder is there already where a run resumed from before it.
                publish_folder(self._partial, self.folder)
                write_durably(run / TRACKER, str(self.iteration))

            on_first_rank(publish, self._topology)
        return self.folder

    def abandon(self) -> None:
        """Leave nothing of it."""
        self._writing.wait()
        shutil.rmtree(self._partial, ignore_errors=True)


class Writing:
    """This rank's files on their way to the disk."""

    def __init__(self, writer: ThreadsWriter, common: dict[str, object], in_background: bool) -> None:
        """Write them now, or begin to.

        Args:
            common: what is no part of a tensor, as the first rank stores it.
        """
        self.writer = writer
        self._common = common
        self._failure: BaseException | None = None
        # A daemon: a job that ends by an error does not wait for it, and what it leaves is removed by the next start.
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        if in_background:
            self._thread.start()
        else:
            self._thread.run()

    def _write(self) -> None:
        try:
            self.writer.write()
        except BaseException as failure:  # noqa: BLE001 - a fault of the program, raised where it is waited for
            self._failure = failure

    @property
    def is_over(self) -> bool:
        """Whether nothing more is written."""
        return not self._thread.is_alive()

    def store_common(self, path: Path) -> None:
        """Write what is no part of a tensor; for the first rank. Raises OSError, which torch's own writer hides."""
        content = io.BytesIO()
        torch.save(self._common, content)
        with naming(path):
            path.write_bytes(content.getbuffer())

    def wait(self) -> None:
        """Return when nothing more is written."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure


def _write_shards(engine: Engine, partial: Path, weights_only: bool, in_background: bool) -> Writing:
    """Plan who writes what of weights and optimizer, and begin to write this rank's share. Collective."""
    state = sharded_state(engine, is_loading=False, weights_only=weights_only)
    try:
        sharded, common = save_preprocess(state, True)
        writer = plan_save(sharded, partial, is_copied=in_background)
    except OSError as error:
        raise UserError(_told(error, partial)) from error
    return Writing(writer, copy.deepcopy(common), in_background)


def _gather_shards(writing: Writing, partial: Path, topology: Topology) -> list[WrittenShards]:
    """Wait for the files; what every rank wrote. Collective. Raises UserError, on all ranks, where one could not."""
    writing.wait()
    writer = writing.writer
    raise_together(None if writer.failure is None else _told(writer.failure, partial), topology)
    own = {"host": socket.gethostname(), "files": {name: to_object(record) for name, record in writer.written.items()}}
    return [msgspec.convert(told, WrittenShards) for told in gather_json(own, topology)]


@contextlib.contextmanager
def _removing(partial: Path) -> Iterator[None]:
    """Remove what was written where the `with` block raises UserError: a full disk should not stay full."""
    try:
        yield
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _told(error: OSError | RuntimeError, folder: Path) -> str:
    """Why a file in `folder` was not written, in one line; a full disk in the words used everywhere."""
    if isinstance(error, OSError):
        return f"{error.filename or folder}: cannot write the checkpoint: {reason_of(error)}"
    reason = str(error).strip().split("\n")[0]
    if _is_of_torch_writer(reason) and shutil.disk_usage(folder).free < _NEARLY_FULL_BYTES:
        reason = reason_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return f"{folder}: cannot write the checkpoint: {reason}"


def _is_of_torch_writer(reason: str) -> bool:
    """Whether a text is from torch's own writer of archives, which does not say why it failed."""
    return "PytorchStreamWriter" in reason or "inline_container" in reason
