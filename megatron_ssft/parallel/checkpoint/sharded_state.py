"""What of an engine a checkpoint holds, as megatron-core's sharded tensors, and whether all of it is finite."""

from __future__ import annotations

from megatron.core import parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ssft.parallel.collectives import raise_together
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.finite import LOWER_LR, find_damaged_state, find_damaged_weight
from megatron_ssft.parallel.optimizer import ShardedState, sharded_optimizer_state
from megatron_ssft.parallel.topology import Topology

ROWS = "forking_rows.weight"
EXTRA = "_extra_state"
"""Objects, not tensors (fp8 scales, mostly empty): left out, as reading them may run code."""


def chunk_keys(engine: Engine) -> list[str]:
    """Name in a checkpoint of each of the engine's model chunks."""
    return ["model"] if len(engine.chunks) == 1 else [f"model{i}" for i in range(len(engine.chunks))]


def sharded_state(engine: Engine, is_loading: bool, weights_only: bool) -> ShardedState:
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
    model = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(chunk_keys(engine), engine.chunks)}
    state: ShardedState = {
        key: {name: entry for name, entry in part.items() if not name.endswith((ROWS, EXTRA))}
        for key, part in model.items()
    }
    if not weights_only:
        if engine.last_layers is not None:
            metadata["non_homogeneous_layers"] = True
            model = {
                key: chunk.sharded_state_dict(metadata=metadata)
                for key, chunk in zip(chunk_keys(engine), engine.chunks)
            }
        state["optimizer"] = sharded_optimizer_state(engine.optimizer, model, is_loading, metadata)
    return state


def find_nonfinite(engine: Engine) -> str | None:
    """What of this rank holds NaN or infinity, its weights first; None: nothing does."""
    weight = find_damaged_weight(engine.chunks)
    state = find_damaged_state(engine.optimizer) if engine.is_started and weight is None else None
    return f"weight {weight}" if weight else state and f"optimizer state ({state})"


def refuse_nonfinite(found: str | None, where: str, topology: Topology, advice: str = LOWER_LR) -> None:
    """Raise UserError on every rank where one found NaN or infinity. Collective."""
    raise_together(found and f"{where}: {found} holds NaN or infinity; {advice}", topology)


def first_reason(error: CheckpointException) -> str:
    """Quote in one line the first rank that failed."""
    reasons = {str(failure[0] if isinstance(failure, tuple) else failure) for failure in error.failures.values()}
    return min(reasons, default="another rank failed").strip().split("\n")[0]
