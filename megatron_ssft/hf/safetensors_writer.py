"""Safetensors folders written tensor by tensor; safetensors_io.py says what the files look like."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import publish_file, sync_file, write_durably
from megatron_ssft.hf.safetensors_io import DTYPES, INDEX, SINGLE, bytes_of

DEFAULT_SHARD_BYTES = 5 * 10**9


class TensorPlan(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Streams tensors into `model.safetensors`, or into shards with their index, one tensor at a time.

    Everything is laid out beforehand, so nothing is held back. A file has its name once it is complete and on disk,
    the index comes last: what a crash leaves does not pass for a model.

    Args:
        folder: where to write; it exists and holds no weights.
        tensors: (name, dtype, shape) of every tensor in the order in which they will come.
        max_shard_bytes: a shard is closed before it would grow larger; a larger tensor has a shard of its own.

    Raises:
        UserError: the folder has weights already, or cannot be written (also by `write` and `finish`).
    """

    def __init__(
        self,
        folder: Path | str,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        plans = [TensorPlan(name, dtype, tuple(shape)) for name, dtype, shape in tensors]
        assert plans and len({plan.name for plan in plans}) == len(plans), "names must be given once each"
        if any(self.folder.glob("*.safetensors")) or (self.folder / INDEX).exists():
            raise UserError(f"{self.folder}: holds weights already; choose another folder or remove them")
        self._total = sum(plan.num_bytes for plan in plans)
        self._shards = _split(plans, max_shard_bytes)
        self._coming = [(i, plan) for i, shard in enumerate(self._shards) for plan in shard]
        self._written = 0
        self._file: BinaryIO | None = None
        self._offsets: dict[str, int] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor. It must be the planned one, in name, dtype and shape; it may be on any device."""
        assert self._written < len(self._coming), f"{name} comes after the last tensor"
        shard, plan = self._coming[self._written]
        assert TensorPlan(name, tensor.dtype, tuple(tensor.shape)) == plan, f"{name} comes where {plan} was planned"
        try:
            file = self._file = self._file or self._begin(shard)
            file.seek(self._offsets[name])
            file.write(bytes_of(tensor.detach().cpu().contiguous()))
            self._written += 1
            if self._written == len(self._coming) or self._coming[self._written][0] != shard:
                self._file = None
                self._complete(shard, file)
        except OSError as error:
            raise self._cannot(shard, error) from error

    def finish(self) -> None:
        """Write the index where there are several shards. All tensors must have come."""
        assert self._written == len(self._coming), f"{self._coming[self._written][1].name} did not come"
        if len(self._shards) == 1:
            return
        files = {plan.name: self._name(i) for i, plan in self._coming}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(files.items()))}
        try:
            write_durably(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.folder / INDEX}: cannot be written: {reason_of(error)}") from error

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _partial(self, shard: int) -> Path:
        return self.folder / f"{self._name(shard)}.partial"

    def _begin(self, shard: int) -> BinaryIO:
        """Open the shard's file and write the header.

        In the file wider dtypes come first, so that every tensor is aligned to its own.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        names = {dtype: name for name, dtype in DTYPES.items()}
        end = 0
        for plan in sorted(self._shards[shard], key=lambda plan: -plan.dtype.itemsize):
            begin, end = end, end + plan.num_bytes
            header[plan.name] = {"dtype": names[plan.dtype], "shape": list(plan.shape), "data_offsets": [begin, end]}
            self._offsets[plan.name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for plan in self._shards[shard]:
            self._offsets[plan.name] += 8 + len(text)
        file = open(self._partial(shard), "wb")  # noqa: SIM115
        file.write(len(text).to_bytes(8, "little") + text)
        return file

    def _complete(self, shard: int, file: BinaryIO) -> None:
        sync_file(file)
        file.close()
        publish_file(self._partial(shard), self.folder / self._name(shard))

    def _cannot(self, shard: int, error: OSError) -> UserError:
        return UserError(f"{self.folder / self._name(shard)}: cannot be written: {reason_of(error)}")


def _split(plans: list[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Shards in order, each as full as it may be."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    return shards
