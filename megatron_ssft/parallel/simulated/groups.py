"""Process groups of any size in one process: the other ranks are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ssft.config import RunConfig
from megatron_ssft.parallel.control_group import ControlGroup
from megatron_ssft.parallel.groups import initialize_model_parallel
from megatron_ssft.parallel.simulated.torch_parts import FakeStore, make_fake_group
from megatron_ssft.parallel.topology import Topology, check_world_size, first_replica, place_in_groups
from megatron_ssft.parallel.watch.watch import Watch

_BACKEND = "simulated"
_MINUTES = 1.0
"""A limit that nothing takes."""


class SimulatedControlGroup(ControlGroup):
    """All ranks say what this one says."""

    def broadcast(self, payload: bytes, source: int) -> bytes:
        return payload

    def all_gather(self, payload: bytes) -> list[bytes]:
        return [payload] * self._world_size

    def all_reduce(self, numbers: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if op == dist.ReduceOp.SUM:
            numbers.mul_(self._world_size)

    def send(self, tensor: Tensor, target: int) -> None: ...

    def receive(self, tensor: Tensor, source: int) -> None: ...


class SimulatedTopology(Topology):
    """The place of a rank that finds for itself what the first rank would tell it."""

    @property
    def is_first_rank(self) -> bool:
        return True


@contextlib.contextmanager
def simulated_groups(
    config: RunConfig, rank: int, world_size: int, device: torch.device
) -> Iterator[tuple[SimulatedTopology, int]]:
    """Inside the `with` block this process is that rank; its topology, and how many groups all ranks made.

    Raises:
        UserError: the ranks cannot be arranged as the configuration asks.
    """
    check_world_size(config, world_size)
    if not hasattr(dist.Backend, _BACKEND.upper()):
        dist.Backend.register_backend(_BACKEND, make_fake_group, extended_api=True, devices=["cpu", device.type])
    made, real = [0], dist.new_group

    def counting(*args: Any, **kwargs: Any) -> object:
        made[0] += 1
        return real(*args, **kwargs)

    dist.init_process_group(_BACKEND, rank=rank, world_size=world_size, store=FakeStore())
    try:
        dist.new_group = counting
        try:
            initialize_model_parallel(config, _MINUTES)
            replica, limit = first_replica(config.parallel, world_size), timedelta(minutes=_MINUTES)
            control_group = SimulatedControlGroup(rank, world_size, replica, limit, _BACKEND)
        finally:
            dist.new_group = real
        topology = place_in_groups(config, device, control_group, Watch())
        yield SimulatedTopology(**vars(topology)), made[0]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
