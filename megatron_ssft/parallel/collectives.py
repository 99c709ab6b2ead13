"""Small collectives of the training loop, on plain values. None is called on a failure path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ssft.errors import UserError, reason_of, shared_error
from megatron_ssft.parallel.topology import Topology

T = TypeVar("T")


def broadcast_json(value: T, topology: Topology) -> T:
    """The first rank's `value` on every rank. It must survive a JSON round trip."""
    text = json.dumps(value) if topology.is_first_rank else ""
    received: T = json.loads(_broadcast_text(text, 0, topology))
    return received


def _broadcast_text(text: str, source: int, topology: Topology) -> str:
    """Rank `source`'s text on every rank."""
    with topology.watch.waiting():
        return topology.control_group.broadcast(text.encode(), source).decode()


def gather_json(value: T, topology: Topology) -> list[T]:
    """Every rank's `value`, by rank, on every rank. It must survive a JSON round trip."""
    with topology.watch.waiting():
        gathered = topology.control_group.all_gather(json.dumps(value).encode())
    return [json.loads(text) for text in gathered]


def gather_integers(values: Sequence[int], topology: Topology) -> np.ndarray:
    """int64 [ranks, k]: every rank's k values, on every rank, in one all-reduce."""
    table = torch.zeros(topology.world_size, len(values), dtype=torch.int64)
    table[topology.rank] = torch.tensor(values, dtype=torch.int64)
    with topology.watch.waiting():
        topology.control_group.all_reduce(table, dist.ReduceOp.SUM)
    return table.numpy()


def collect_logits(share: torch.Tensor | None, topology: Topology, tokens: int, vocab_size: int) -> torch.Tensor | None:
    """float32 [T, vocab_size] on the first rank from the last stage's shares [T, V / tp]; None on the others."""
    if share is not None:
        group = parallel_state.get_tensor_model_parallel_group()
        shares = [torch.empty_like(share) for _ in range(group.size())]
        dist.all_gather(shares, share.contiguous(), group=group)
        share = torch.cat(shares, dim=-1)[:, :vocab_size].cpu().contiguous()
    source = parallel_state.get_pipeline_model_parallel_last_rank()  # of the first rank's own pipeline, there
    source = broadcast_json(source, topology)
    if source == 0:
        return share if topology.is_first_rank else None
    if topology.rank == source:
        assert share is not None, "the last stage has the logits"
        topology.control_group.send(share, 0)
    elif topology.is_first_rank:
        share = torch.empty(tokens, vocab_size)
        with topology.watch.waiting():
            topology.control_group.receive(share, source)
        return share
    return None


def on_first_rank(work: Callable[[], T], topology: Topology) -> T:
    """Run `work` on the first rank only and give its result to all. The result must survive a JSON round trip.

    A UserError or OSError there becomes the same UserError everywhere, so that every rank ends, and none waits.
    """
    outcome: dict[str, Any] = {}
    if topology.is_first_rank:
        try:
            outcome = {"result": work()}
        except UserError as error:
            outcome = {"error": str(error), "status": error.status}
        except OSError as error:  # a full or read-only disk, mostly
            outcome = {"error": f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error)}
    outcome = broadcast_json(outcome, topology)
    if "error" in outcome:
        raise shared_error(outcome["error"], outcome.get("status", UserError.status))
    result: T = outcome["result"]
    return result


def sum_over_ranks(values: np.ndarray | torch.Tensor, topology: Topology) -> np.ndarray:
    """float64 sum over all ranks, same shape, in one all-reduce. Ranks without a share pass zeros."""
    tensor = torch.as_tensor(values, dtype=torch.float64).to(topology.device)
    with topology.watch.waiting():
        dist.all_reduce(tensor)
        tensor = tensor.cpu()
    return tensor.numpy()


def any_rank(flag: bool, topology: Topology, error: str | None = None) -> bool:
    """Whether the flag is set on at least one rank; the same answer everywhere.

    Raises UserError on all ranks where one of them has an `error`: that of the first.
    """
    first = 0 if error is None else topology.world_size - topology.rank
    tensor = torch.tensor([int(flag), first])
    with topology.watch.waiting():
        topology.control_group.all_reduce(tensor, dist.ReduceOp.MAX)
    if tensor[1]:
        raise shared_error(_broadcast_text(error or "", topology.world_size - int(tensor[1]), topology))
    return bool(tensor[0])


def barrier(topology: Topology) -> None:
    """Wait for all ranks, for as long as the phase allows."""
    with topology.watch.waiting():
        topology.control_group.barrier()


def raise_together(error: str | None, topology: Topology) -> None:
    """Raise the same UserError on every rank if any rank found an error; called by all, found or not."""
    first = torch.tensor([topology.world_size if error is None else topology.rank])
    with topology.watch.waiting():
        topology.control_group.all_reduce(first, dist.ReduceOp.MIN)
    finder = int(first)
    if finder < topology.world_size:
        raise shared_error(_broadcast_text(error or "", finder, topology))
