"""Bytes alive, by part and by line of code: a storage counts from the operation that made it to its end."""

from __future__ import annotations

import weakref
from collections import Counter

from torch import Tensor

from megatron_ssft.parallel.simulated.records import PARTS, Memory, Part
from megatron_ssft.parallel.simulated.sites import Site, here
from megatron_ssft.parallel.simulated.torch_parts import WeakIdKeyDictionary

_BLOCK = 512
"""Bytes; torch's allocator for CUDA gives out multiples of it."""
_SITES_KEPT = 20
_PARTS_BY_FILE: tuple[tuple[str, Part], ...] = (
    ("model/loss_head.py", "loss head"),
    ("core/pipeline_parallel/p2p_communication.py", "communication"),
    ("core/tensor_parallel/mappings.py", "communication"),
    ("core/tensor_parallel/utils.py", "communication"),
    ("core/utils.py", "communication"),  # the buffer that sequence parallelism gathers into
    ("core/optimizer/optimizer.py", "optimizer"),
    ("core/optimizer/distrib_optimizer.py", "optimizer"),
    ("core/optimizer/clip_grads.py", "optimizer"),
    ("parallel/optimizer.py", "optimizer"),
    ("core/distributed/param_and_grad_buffer.py", "gradients"),
)
"""Memory that these files make, by the end of the file's name."""


class _Entry:
    """One storage that is alive."""

    __slots__ = ("bytes", "part", "site")

    def __init__(self, size: int, part: Part, site: Site) -> None:
        self.bytes, self.part, self.site = size, part, site


class Ledger:
    """Memory of one device. Tensors are shown to it when an operation returns them."""

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self.usual_part: Part = "weights"
        """Of what no file decides."""
        self._entries = WeakIdKeyDictionary()
        self._parts: Counter[Part] = Counter()
        self._sites: Counter[Site] = Counter()
        self._part_of_file: dict[str, Part | None] = {}
        self._at_peak: tuple[Counter[Part], Counter[Site]] | None = None
        self._is_higher = False
        """Whether the present height is a new peak that is not written down yet."""

    def add(self, tensor: Tensor, part: Part | None = None) -> None:
        """Count the tensor's storage if it is a new one. `part`: by default what the line that made it is for."""
        storage = tensor.untyped_storage()
        if storage in self._entries:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        site = here()
        entry = _Entry(size, part or self._part_at(site), site)
        self._entries[storage] = entry
        weakref.finalize(storage, self._drop, entry)
        self.alive += size
        self._parts[entry.part] += size
        self._sites[site] += size
        if self.alive > self.peak:
            self.peak, self._is_higher = self.alive, True

    def _part_at(self, site: Site) -> Part:
        if site.file not in self._part_of_file:
            found = (part for end, part in _PARTS_BY_FILE if site.file.endswith(end))
            self._part_of_file[site.file] = next(found, None)
        return self._part_of_file[site.file] or self.usual_part

    def _drop(self, entry: _Entry) -> None:
        self._write_down_peak()
        self.alive -= entry.bytes
        self._parts[entry.part] -= entry.bytes
        self._sites[entry.site] -= entry.bytes

    def _write_down_peak(self) -> None:
        """Only where something ends is it known that there was a peak; so it is written down once for each."""
        if self._is_higher:
            self._is_higher = False
            self._at_peak = self._parts.copy(), self._sites.copy()

    def is_for(self, tensor: Tensor, part: Part) -> None:
        """Say what the tensor's storage is for, where the line that made it does not tell."""
        entry: _Entry | None = self._entries.get(tensor.untyped_storage())
        if entry is not None:
            self._write_down_peak()
            self._parts[entry.part] -= entry.bytes
            entry.part = part
            self._parts[part] += entry.bytes

    def begin(self) -> None:
        """From now on the peak is that of what follows."""
        self.peak, self._is_higher, self._at_peak = self.alive, True, None

    def account(self) -> Memory:
        """Since `begin`."""
        self._write_down_peak()
        assert self._at_peak is not None
        parts, sites = self._at_peak
        most = sorted(((str(site), size) for site, size in sites.items() if size), key=lambda item: -item[1])
        return Memory(
            peak=self.peak,
            after=self.alive,
            peak_parts=_by_part(parts),
            after_parts=_by_part(self._parts),
            peak_sites=tuple(most[:_SITES_KEPT]),
        )


def _by_part(sizes: Counter[Part]) -> dict[Part, int]:
    return {part: sizes[part] for part in PARTS if sizes[part]}
