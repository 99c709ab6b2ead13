"""Talk between all ranks over gloo, for plain values and for waiting, with few connections a rank.

A gloo group connects each of its ranks with each other. Over 1,024 ranks that is more descriptors than a process may
have. So ranks stand in blocks, the first of a block leads it, and only leaders are connected with each other: at most
twice the square root of the number of ranks. A job that fits into one block is a single group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

FLAT = 64
"""Up to so many ranks are one group."""
_MULTIPLE = 8
"""Ranks on a node, mostly, which a block should hold together."""


def block_size(world_size: int) -> int:
    """Ranks in a block: all, or about the square root of their number."""
    if world_size <= FLAT:
        return world_size
    return -(-math.isqrt(world_size - 1) // _MULTIPLE) * _MULTIPLE


class ControlGroup:
    """All ranks of a job. Each operation is for all ranks to call, in the same order, but `send` and `receive`."""

    def __init__(
        self, rank: int, world_size: int, first_replica: Sequence[int], timeout: timedelta, backend: str = "gloo"
    ) -> None:
        """Build the groups. Collective.

        Args:
            first_replica: ranks that hold one copy of the model between them, the first rank among them; `send` and
                `receive` are between these.
            timeout: for one operation.
            backend: torch's name of what connects the ranks.
        """
        self._rank, self._world_size = rank, world_size
        self._size = size = block_size(world_size)
        leaders = range(0, world_size, size)
        self._block: dist.ProcessGroup | None = None
        for first in leaders:
            group = dist.new_group(range(first, min(first + size, world_size)), timeout, backend)
            if self._leader_of(rank) == first:
                self._block = group
        self._leaders = self._replica = None
        if len(leaders) > 1:
            self._leaders = dist.new_group(leaders, timeout, backend)
            self._replica = dist.new_group(sorted(first_replica), timeout, backend)

    def _leader_of(self, rank: int) -> int:
        return rank // self._size * self._size

    @property
    def _leads(self) -> bool:
        return self._leaders is not None and self._rank == self._leader_of(self._rank)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        """In place, from rank `source` to all."""
        own, leader = self._leader_of(self._rank), self._leader_of(source)
        if own == leader:
            dist.broadcast(tensor, source, self._block)
        if self._leads:
            dist.broadcast(tensor, leader, self._leaders)
        if own != leader:
            dist.broadcast(tensor, own, self._block)

    def broadcast(self, payload: bytes, source: int) -> bytes:
        """Rank `source`'s payload on every rank; that of the others is not looked at."""
        is_source = self._rank == source
        size = torch.tensor([len(payload) if is_source else 0])
        self._broadcast(size, source)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if is_source and payload:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        self._broadcast(buffer, source)
        return buffer.numpy().tobytes()

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank, on every rank."""
        payloads = _gathered(payload, self._block)
        if self._leaders is None:
            return payloads
        joined = b""
        if self._leads:
            joined = _framed(
                [each for block in _gathered(_framed(payloads), self._leaders) for each in _unframed(block)]
            )
        # Each leader has the same by now, and tells its block.
        size = torch.tensor([len(joined)])
        own = self._leader_of(self._rank)
        dist.broadcast(size, own, self._block)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self._leads:
            buffer.copy_(torch.frombuffer(bytearray(joined), dtype=torch.uint8))
        dist.broadcast(buffer, own, self._block)
        return _unframed(buffer.numpy().tobytes())

    def all_reduce(self, numbers: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Combine int64 numbers of all ranks in place; the order of the ranks does not matter to them."""
        assert numbers.dtype == torch.int64
        dist.all_reduce(numbers, op, self._block)
        if self._leads:
            dist.all_reduce(numbers, op, self._leaders)
        if self._leaders is not None:
            dist.broadcast(numbers, self._leader_of(self._rank), self._block)

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.all_reduce(torch.zeros(1, dtype=torch.int64), dist.ReduceOp.SUM)

    def send(self, tensor: Tensor, target: int) -> None:
        """To another rank of the first replica, which receives."""
        dist.send(tensor, target, self._replica or self._block)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill the tensor with what another rank of the first replica sends."""
        dist.recv(tensor, source, self._replica or self._block)


def _gathered(payload: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """The payloads of a group's ranks, by rank."""
    count = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(payload)]), group)
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    if payload:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(gathered, padded, group)
    return [each[: int(size)].numpy().tobytes() for each, size in zip(gathered, sizes)]


def _framed(payloads: list[bytes]) -> bytes:
    """Payloads as one, each led by its length."""
    return b"".join(len(payload).to_bytes(8, "little") + payload for payload in payloads)


def _unframed(joined: bytes) -> list[bytes]:
    payloads, at = [], 0
    while at < len(joined):
        end = at + 8 + int.from_bytes(joined[at : at + 8], "little")
        payloads.append(joined[at + 8 : end])
        at = end
    return payloads
