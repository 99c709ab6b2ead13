"""Atomic checkpoints in megatron-core's distributed format: complete or absent, loadable at any parallel layout.

A run folder holds `iter_0000010/` and so on, and `latest_checkpointed_iteration.txt`. A checkpoint is written under
a temporary name and renamed when everything is on disk, so a folder `iter_*` is always complete. Our own state is
JSON; megatron-core's pickles are scanned before they are opened.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from msgspec import structs
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ssft.errors import DamagedCheckpoint, UserError, reason_of, shared_error
from megatron_ssft.formats.files import publish_folder, write_durably
from megatron_ssft.formats.jsonl import to_object
from megatron_ssft.formats.manifest import FileRecord, seal
from megatron_ssft.formats.run_folder import REMOVE_ADVICE, STATE, TRACKER, checkpoint_folder
from megatron_ssft.formats.train_state import WeightsState, decode_state, encode_state, read_train_state
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_unusable
from megatron_ssft.parallel.checkpoint.shards import WrittenShards, complete_shards
from megatron_ssft.parallel.checkpoint.writer import save_strategy
from megatron_ssft.parallel.collectives import gather_json, on_first_rank, raise_together
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.finite import LOWER_LR, find_damaged_state, find_damaged_weight
from megatron_ssft.parallel.model.initialization import fold_forking_rows, take_forking_rows
from megatron_ssft.parallel.optimizer import ShardedState, load_optimizer_state, sharded_optimizer_state
from megatron_ssft.parallel.topology import Topology

_ROWS = "forking_rows.weight"
_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
_NEARLY_FULL_BYTES = 1 << 20
_EXTRA = "_extra_state"  # objects, not tensors (fp8 scales, mostly empty): left out, as reading them may run code


def read_state(run: Path, iteration: int) -> WeightsState:
    """The state stored with a checkpoint, as the record of its kind. Raises UserError if it is damaged."""
    return read_train_state(checkpoint_folder(run, iteration) / STATE)


def read_state_everywhere(run: Path, iteration: int, topology: Topology) -> WeightsState:
    """`read_state` by the first rank, whose errors all ranks share. Collective."""
    text: str = on_first_rank(lambda: encode_state(read_state(run, iteration)), topology)
    return decode_state(text, checkpoint_folder(run, iteration) / STATE)


def save_checkpoint(engine: Engine, run: Path, iteration: int, state: WeightsState) -> Path:
    """Write weights, optimizer (where there is one) and `state`. Collective; returns the folder.

    Raises:
        UserError: weights or optimizer state are not finite, the disk is full, or not all ranks write into one folder;
            nothing is published then.
    """
    folder, topology = checkpoint_folder(run, iteration), engine.topology

    def prepare() -> str:
        # A name of its own: should two jobs write here in spite of the lease, neither publishes the other's shards.
        run.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=run))
        made.chmod(0o755)  # mkdtemp keeps others out
        return str(made)

    partial = Path(on_first_rank(prepare, topology))
    try:
        fold_forking_rows(engine.chunks)
        with ThreadPoolExecutor(1) as looking:  # while the disk is waited for
            damage = looking.submit(find_nonfinite, engine)
            shards = _write_shards(engine, partial)
        _refuse_nonfinite(damage.result(), f"{folder}: is not saved", topology)

        def publish() -> None:
            write_durably(partial / STATE, encode_state(structs.replace(state, has_manifest=True)))
            seal(partial, complete_shards(partial, shards))
            # The folder is there already where a run resumed from before it.
            publish_folder(partial, folder)
            write_durably(run / TRACKER, str(iteration))

        on_first_rank(publish, topology)
    except UserError:  # a full disk should not stay full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write_shards(engine: Engine, partial: Path) -> list[WrittenShards]:
    """Write weights and optimizer; what every rank wrote. Collective."""
    sharded = _sharded_state(engine, is_loading=False, weights_only=not engine.is_started)
    written: dict[str, FileRecord] = {}
    try:
        dist_checkpointing.save(sharded, str(partial), sharded_strategy=save_strategy(written))
    except CheckpointException as error:  # of any rank, told to all
        raise shared_error(
            f"{partial}: cannot write the checkpoint: {_write_failure(_first_reason(error), partial)}"
        ) from error
    except OSError as error:
        raise UserError(f"{error.filename or partial}: cannot write the checkpoint: {reason_of(error)}") from error
    except RuntimeError as error:
        if not _is_of_torch_writer(str(error)):
            raise
        reason = _write_failure(str(error).strip().split("\n")[0], partial)
        raise UserError(f"{partial}: cannot write the checkpoint: {reason}") from error
    own = {"host": socket.gethostname(), "files": {name: to_object(record) for name, record in written.items()}}
    return [msgspec.convert(told, WrittenShards) for told in gather_json(own, engine.topology)]


def find_nonfinite(engine: Engine) -> str | None:
    """What of this rank holds NaN or infinity, its weights first; None: nothing does."""
    weight = find_damaged_weight(engine.chunks)
    state = find_damaged_state(engine.optimizer) if engine.is_started and weight is None else None
    return f"weight {weight}" if weight else state and f"optimizer state ({state})"


def _refuse_nonfinite(found: str | None, where: str, topology: Topology, advice: str = LOWER_LR) -> None:
    """Raise UserError on every rank where one found NaN or infinity. Collective."""
    raise_together(found and f"{where}: {found} holds NaN or infinity; {advice}", topology)


def load_checkpoint(engine: Engine, run: Path, iteration: int, weights_only: bool = False, untie: bool = False) -> None:
    """Load the checkpoint of a run at this iteration, as `load_folder` does. Collective."""
    load_folder(engine, checkpoint_folder(run, iteration), weights_only, untie)


def load_folder(engine: Engine, folder: Path, weights_only: bool = True, untie: bool = False) -> None:
    """Fill weights, and unless `weights_only` the optimizer, at whatever parallel layout the engine has. Collective.

    `untie`: the checkpoint's model has tied embeddings, the engine's output head becomes a copy of them.

    Raises:
        DamagedCheckpoint: a shard cannot be read, or a number is NaN or infinite.
        UserError: the checkpoint is foreign, or does not fit the model.
    """
    on_first_rank(lambda: refuse_unusable(folder), engine.topology)
    sharded = _sharded_state(engine, is_loading=True, weights_only=weights_only)
    if untie:
        for key in _chunk_keys(engine):
            head = sharded[key].get(_HEAD)
            if head is not None:  # a second reader of the embedding
                head.key, head.replica_id = _EMBEDDING, (1, *head.replica_id[1:])
    try:
        state = dist_checkpointing.load(sharded, folder)
    except (CheckpointingException, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise UserError(f"{folder}: does not fit this model or optimizer: {reason}") from error
    except CheckpointException as error:  # torch's, of ranks that failed to read their shards
        raise DamagedCheckpoint(f"{folder}: damaged ({_first_reason(error)}); {REMOVE_ADVICE}") from error
    for key, chunk in zip(_chunk_keys(engine), engine.chunks):
        missing, unexpected = chunk.load_state_dict(state[key], strict=False)
        absent = [name for name in missing if not name.endswith((_ROWS, _EXTRA))]
        if absent or unexpected:
            raise UserError(f"{folder}: does not fit this model: missing {absent}, unexpected {list(unexpected)}")
    take_forking_rows(engine.chunks)
    if engine.is_started:
        if weights_only:
            engine.optimizer.reload_model_params()
        else:
            _restore_optimizer(engine, folder, state)
    try:
        _refuse_nonfinite(find_nonfinite(engine), f"{folder}: is damaged", engine.topology, REMOVE_ADVICE)
    except UserError as error:  # of any rank, told to all
        raise DamagedCheckpoint(str(error)) from error


def _restore_optimizer(engine: Engine, folder: Path, state: ShardedState) -> None:
    """Restore the optimizer from what was loaded. Raises UserError where that is not what it needs. Collective."""
    error = None
    try:
        load_optimizer_state(engine.optimizer, state["optimizer"])
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as caught:
        reason = str(caught).strip().split("\n")[0]
        error = f"{folder}: does not fit this optimizer: {type(caught).__name__}: {reason}; {REMOVE_ADVICE}"
    raise_together(error, engine.topology)


def _first_reason(error: CheckpointException) -> str:
    """Quote in one line the first rank that failed."""
    reasons = {str(failure[0] if isinstance(failure, tuple) else failure) for failure in error.failures.values()}
    return min(reasons).strip().split("\n")[0]


def _write_failure(reason: str, folder: Path) -> str:
    """What a text says of why a file in `folder` was not written; a full disk in the words used everywhere."""
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in reason:
            return reason_of(OSError(number, os.strerror(number)))
    if _is_of_torch_writer(reason) and shutil.disk_usage(folder).free < _NEARLY_FULL_BYTES:
        return reason_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return reason


def _is_of_torch_writer(reason: str) -> bool:
    """Whether a text is from torch's own writer of archives, which does not say why it failed."""
    return "PytorchStreamWriter" in reason or "inline_container" in reason


def _chunk_keys(engine: Engine) -> list[str]:
    return ["model"] if len(engine.chunks) == 1 else [f"model{i}" for i in range(len(engine.chunks))]


def _sharded_state(engine: Engine, is_loading: bool, weights_only: bool = False) -> ShardedState:
    """Collect what is saved or loaded, as megatron-core's sharded tensors.

    The tags' own rows are folded into the embedding, so the model part leaves them out; the optimizer's state of
    these rows is stored under their own name. Layers are stacked into one tensor each; the state of an optimizer that
    trains some of them only cannot be, so its layers are stored one by one.
    """
    metadata: dict[str, object] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_chunk_keys(engine), engine.chunks)}
    state: ShardedState = {
        key: {name: entry for name, entry in part.items() if not name.endswith((_ROWS, _EXTRA))}
        for key, part in model.items()
    }
    if not weights_only:
        if engine.last_layers is not None:
            metadata["non_homogeneous_layers"] = True
            model = {
                key: chunk.sharded_state_dict(metadata=metadata)
                for key, chunk in zip(_chunk_keys(engine), engine.chunks)
            }
        state["optimizer"] = sharded_optimizer_state(engine.optimizer, model, is_loading, metadata)
    return state
