"""Megatron's process groups, without those that nobody uses.

megatron-core makes some 3,500 groups for 1,024 ranks: of most kinds there are several with the same ranks, and those of
experts, of fp8 and of learned positions are of no use here. Each costs every rank a call, and a rank that is in it
connections and buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ssft.config import RunConfig

_UNUSED = ("TENSOR_AND_DATA", "TENSOR_AND_CONTEXT", "HIERARCHICAL")
"""What descriptions of groups begin with that are for experts' balance and for the scales of fp8."""


class UnusedGroup:
    """Stands for a group that was not made. Any use is an error, where None would mean all ranks."""

    def __init__(self, description: str) -> None:
        self._description = description

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the process group {self._description} was not made: nothing should use it ({name})")


def initialize_model_parallel(config: RunConfig, timeout_minutes: float) -> None:
    """Build the groups of tensor, pipeline, context and data parallelism. Collective."""
    with _few_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
            context_parallel_size=config.parallel.context_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,
        )


@contextlib.contextmanager
def _few_groups() -> Iterator[None]:
    """Inside the `with` block megatron-core makes each set of ranks one group, and none that is not used.

    Pipelines keep groups of their own: what they send must not queue with what the same ranks add up.
    """
    real = parallel_state.create_group
    rank, world_size = dist.get_rank(), dist.get_world_size()
    made: dict[tuple[bool, tuple[int, ...]], Any] = {}

    def create_group(ranks: Sequence[int], *args: Any, group_desc: str | None = None, **kwargs: Any) -> Any:
        description, key = group_desc or "", (group_desc == "PIPELINE_MODEL_PARALLEL_GROUP", tuple(ranks))
        if kwargs.get("pg_options") is not None or kwargs.get("backend") is not None:
            return real(ranks, *args, group_desc=group_desc, **kwargs)
        if key not in made:
            if description.startswith(_UNUSED) and len(ranks) > 1:
                return UnusedGroup(description)
            if not key[0] and len(ranks) == world_size:
                made[key] = dist.group.WORLD
            elif len(ranks) > 1:
                made[key] = real(ranks, *args, group_desc=group_desc, **kwargs)
            else:  # of a rank with itself: its own affair, and alike for all kinds
                own = {"use_local_synchronization": True}
                made[key] = real(ranks, *args, group_desc="SELF", **kwargs | own) if rank in ranks else None
        return made[key]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = real
