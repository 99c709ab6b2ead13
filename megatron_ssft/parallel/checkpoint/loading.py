"""Loads a run's checkpoint, at whatever parallel layout the engine has. Nothing in it is executed."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ssft.errors import DamagedCheckpoint, UserError
from megatron_ssft.formats.run_folder import REMOVE_ADVICE, STATE, checkpoint_folder
from megatron_ssft.formats.train_state import WeightsState, decode_state, encode_state, read_train_state
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_unusable
from megatron_ssft.parallel.checkpoint.reader import SharingStrategy
from megatron_ssft.parallel.checkpoint.sharded_state import (
    EXTRA,
    ROWS,
    chunk_keys,
    find_nonfinite,
    first_reason,
    refuse_nonfinite,
    sharded_state,
)
from megatron_ssft.parallel.collectives import on_first_rank, raise_together
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import take_forking_rows
from megatron_ssft.parallel.optimizer import ShardedState, load_optimizer_state
from megatron_ssft.parallel.topology import Topology

_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def read_state(run: Path, iteration: int) -> WeightsState:
    """The state stored with a checkpoint, as the record of its kind. Raises UserError if it is damaged."""
    return read_train_state(checkpoint_folder(run, iteration) / STATE)


def read_state_everywhere(run: Path, iteration: int, topology: Topology) -> WeightsState:
    """`read_state` by the first rank, whose errors all ranks share. Collective."""
    text: str = on_first_rank(lambda: encode_state(read_state(run, iteration)), topology)
    return decode_state(text, checkpoint_folder(run, iteration) / STATE)


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
    sharded = sharded_state(engine, is_loading=True, weights_only=weights_only)
    if untie:
        for key in chunk_keys(engine):
            head = sharded[key].get(_HEAD)
            if head is not None:  # a second reader of the embedding
                head.key, head.replica_id = _EMBEDDING, (1, *head.replica_id[1:])
    try:
        state = dist_checkpointing.load(sharded, str(folder), sharded_strategy=SharingStrategy())
    except (CheckpointingException, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise UserError(f"{folder}: does not fit this model or optimizer: {reason}") from error
    except CheckpointException as error:  # torch's, of ranks that failed to read their shards
        raise DamagedCheckpoint(f"{folder}: damaged ({first_reason(error)}); {REMOVE_ADVICE}") from error
    fill(engine, folder, state, weights_only)
    try:
        refuse_nonfinite(find_nonfinite(engine), f"{folder}: is damaged", engine.topology, REMOVE_ADVICE)
    except UserError as error:  # of any rank, told to all
        raise DamagedCheckpoint(str(error)) from error


def fill(engine: Engine, folder: Path, state: ShardedState, weights_only: bool) -> None:
    """Put what was loaded into the model, and unless `weights_only` into the optimizer. Collective.

    Raises UserError where it does not fit; `folder`: where it was loaded from.
    """
    for key, chunk in zip(chunk_keys(engine), engine.chunks):
        missing, unexpected = chunk.load_state_dict(state[key], strict=False)
        absent = [name for name in missing if not name.endswith((ROWS, EXTRA))]
        if absent or unexpected:
            raise UserError(f"{folder}: does not fit this model: missing {absent}, unexpected {list(unexpected)}")
    take_forking_rows(engine.chunks)
    if engine.is_started:
        if weights_only:
            engine.optimizer.reload_model_params()
        else:
            _restore_optimizer(engine, folder, state)


def _restore_optimizer(engine: Engine, folder: Path, state: ShardedState) -> None:
    """Restore the optimizer from what was loaded. Raises UserError where that is not what it needs. Collective."""
    error = None
    try:
        load_optimizer_state(engine.optimizer, state["optimizer"])
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as caught:
        reason = str(caught).strip().split("\n")[0]
        error = f"{folder}: does not fit this optimizer: {type(caught).__name__}: {reason}; {REMOVE_ADVICE}"
    raise_together(error, engine.topology)
