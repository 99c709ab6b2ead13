"""Collectives: what torch's operators say that ranks exchange, and which ranks these are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ssft.parallel.simulated.records import Collective
from megatron_ssft.parallel.simulated.torch_parts import tree_leaves

_KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}
"""Operators of c10d that are counted. Another one is an error: it would be left out in silence."""
_NAMED: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("pipeline", lambda: parallel_state.get_pipeline_model_parallel_group()),
    ("tensor", lambda: parallel_state.get_tensor_model_parallel_group()),
    ("context", lambda: parallel_state.get_context_parallel_group(check_initialized=False)),
    ("data", lambda: parallel_state.get_data_parallel_group(with_context_parallel=True)),
    ("embedding", lambda: parallel_state.get_embedding_group(check_initialized=False)),
    ("model", lambda: parallel_state.get_model_parallel_group()),
    ("all", lambda: dist.group.WORLD),
)
"""What the ranks of a group have in common, the first name that fits."""


class Traffic:
    """Messages of this rank."""

    def __init__(self, nodes_of: int) -> None:
        """`nodes_of`: ranks on a node."""
        self._nodes_of = nodes_of
        self._messages: dict[tuple[str, str, int, bool], list[int]] = {}

    def add(self, func: Any, args: tuple) -> None:
        """Count a call of an operator of c10d."""
        kind = _KINDS.get(func.overloadpacket.__name__)
        if kind is None:
            raise NotImplementedError(f"{func}: the simulation does not know this collective")
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        name = _name_of(group)
        if name is None:  # hosts talk, of next to nothing
            return
        ranks = dist.get_process_group_ranks(group)
        concerned = ranks
        if kind in ("send", "receive"):
            peer = next(a for a in args if isinstance(a, int))
            concerned = [dist.get_rank(), ranks[peer]]
        if len(concerned) > 1:
            nodes = {rank // self._nodes_of for rank in concerned}
            key = (kind, name, len(ranks), len(nodes) > 1)
            entry = self._messages.setdefault(key, [0, 0])
            entry[0] += 1
            entry[1] += _payload(kind, args)

    def account(self) -> tuple[Collective, ...]:
        """The most bytes first."""
        found = (Collective(*key, count=count, bytes=size) for key, (count, size) in self._messages.items())
        return tuple(sorted(found, key=lambda each: -each.bytes))


def _name_of(group: dist.ProcessGroup) -> str | None:
    """None for a group that is not megatron-core's."""
    for name, named in _NAMED:
        if getattr(named(), "group_name", None) == group.group_name:
            return name
    return None


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _payload(kind: str, args: tuple) -> int:
    """Bytes of the whole: of what is gathered, of what is reduced."""
    if kind == "barrier":
        return 0
    sides = [_bytes(tree_leaves(a)) for a in args if isinstance(a, (Tensor, list, tuple))]
    return max(sides)


def _bytes(leaves: Iterable[object]) -> int:
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
