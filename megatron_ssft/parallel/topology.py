"""Process groups, and this rank's place in the parallel layout (TP x PP x CP x DP)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ssft.config import ParallelConfig, RunConfig
from megatron_ssft.config.gpus import peak_tflops
from megatron_ssft.errors import UserError
from megatron_ssft.launch import this_launch
from megatron_ssft.parallel.control_group import ControlGroup
from megatron_ssft.parallel.determinism import make_deterministic
from megatron_ssft.parallel.device import choose_device
from megatron_ssft.parallel.groups import initialize_model_parallel
from megatron_ssft.parallel.watch.meeting import meet
from megatron_ssft.parallel.watch.watch import Watch


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Sizes and ranks follow Megatron's names."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    """Data-parallel ranks, not counting context parallelism."""
    stage: int
    """Pipeline stage, from 0."""
    is_last_stage: bool
    control_group: ControlGroup
    """All ranks over gloo, for waiting on one rank's work and for stop flags. Its own time limit is that of slow work;
    the watch ends shorter waits."""
    watch: Watch

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def reports_loss(self) -> bool:
        """True for one rank per share of the loss: last stage, first of its tensor-parallel group."""
        return self.is_last_stage and self.tp_rank == 0


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Raise UserError unless the ranks can be arranged as the configuration asks."""
    size = config.parallel.model_parallel_size
    if world_size % size != 0:
        p = config.parallel
        raise UserError(
            f"{world_size} processes cannot be arranged: tensor {p.tensor_model_parallel_size} x pipeline "
            f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} needs a multiple of {size}"
        )


_open: list[tuple[Watch, ControlGroup]] = []
"""Watch and control group, for `destroy_topology`: process groups are the process's, too."""


def initialize_topology(config: RunConfig, facts: Mapping[str, str] | None = None) -> Topology:
    """Meet the other ranks and build Megatron's parallel groups: NCCL with CUDA, gloo without.

    Args:
        facts: what has to be the same on every rank, by name.

    Raises:
        UserError: the ranks cannot be arranged, or disagree on `facts`.
        LostRank: not all came in time.
    """
    launch = this_launch()
    rank, world_size = launch.rank, launch.world_size
    check_world_size(config, world_size)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # lets communication overlap with computation
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    device = choose_device(config.parallel.device, launch.local_rank)
    if config.parallel.deterministic_mode and device.type == "cuda":
        make_deterministic()
    backend = "nccl" if device.type == "cuda" else "gloo"
    slow = timedelta(minutes=config.parallel.slow_work_timeout_minutes)
    store, watch = meet(rank, world_size, timeout, slow, facts or {})
    with watch.explaining():
        dist.init_process_group(backend, timeout=_limit(timeout), rank=rank, world_size=world_size, store=store)
        initialize_model_parallel(config, _limit(timeout).total_seconds() / 60)
        control_group = ControlGroup(rank, world_size, first_replica(config.parallel, world_size), _limit(slow))
    _open.append((watch, control_group))
    return place_in_groups(config, device, control_group, watch)


def _limit(own: timedelta) -> timedelta:
    """Of a process group: the watch is faster and names who is missing; this is for the case that it cannot."""
    return 1.1 * own + timedelta(seconds=12)


def place_in_groups(config: RunConfig, device: torch.device, control_group: ControlGroup, watch: Watch) -> Topology:
    """This rank's place in the groups that are there, with random numbers seeded."""
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    torch.manual_seed(config.training.seed)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Topology(
        rank=rank,
        world_size=world_size,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        control_group=control_group,
        watch=watch,
    )


def first_replica(parallel: ParallelConfig, world_size: int) -> list[int]:
    """Ranks of the first copy of the model, by Megatron's order: tensor, context, data, pipeline, the first fastest."""
    stages = parallel.pipeline_model_parallel_size
    return [
        stage * (world_size // stages) + tp
        for stage in range(stages)
        for tp in range(parallel.tensor_model_parallel_size)
    ]


def rank_at(parallel: ParallelConfig, world_size: int, stage: int, dp_rank: int) -> int:
    """The first rank of a pipeline stage of a copy of the model, by the same order."""
    shared = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return stage * (world_size // parallel.pipeline_model_parallel_size) + dp_rank * shared


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Turn the error of a broken collective inside the `with` block into a LostRank that names who is missing."""
    try:
        yield
    except (RuntimeError, UserError):
        if not _open:
            raise
        with _open[-1][0].explaining():
            raise


def job_peak_flops(config: RunConfig, topology: Topology) -> float | None:
    """Peak FLOP/s of all GPUs of the job, for MFU; None on the CPU and for a GPU that is not known."""
    tflops = config.logging.gpu_peak_tflops
    if tflops is None and topology.device.type == "cuda" and config.parallel.bf16:
        tflops = peak_tflops(torch.cuda.get_device_name(topology.device))
    return None if tflops is None else tflops * 1e12 * topology.world_size


def destroy_topology() -> None:
    """Leave all groups; called once at a regular end, by all ranks."""
    while _open:
        watch, control_group = _open[-1]  # stays there, for `explaining`
        with watch.phase("ending"):
            _wait_for_all(watch, control_group)  # the store of the signs of life goes with the first rank
        watch.stop()
        _open.pop()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _wait_for_all(watch: Watch, control_group: ControlGroup) -> None:
    with watch.waiting():
        control_group.barrier()
