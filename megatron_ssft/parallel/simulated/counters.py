"""Counts what torch's operators do on this rank's device, with real tensors or simulated ones."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_ssft.parallel.simulated.flops import flops_of
from megatron_ssft.parallel.simulated.ledger import Ledger
from megatron_ssft.parallel.simulated.records import Copies, Flops, Memory, Section, Wait
from megatron_ssft.parallel.simulated.sites import Site, here, innermost_of
from megatron_ssft.parallel.simulated.torch_parts import TorchDispatchMode, graph_task, tree_leaves
from megatron_ssft.parallel.simulated.traffic import Traffic

_COLLECTIVES = "megatron_ssft/parallel/own_work.py"
"""All collectives are called from here."""
_PASSES = frozenset({"forward", "logits", "backward", "_backward"})
"""Functions that are part of a forward or of a backward pass, of modules, of the loss head and of autograd."""


class _Tally:
    """What was counted since it began, but for memory."""

    def __init__(self, nodes_of: int) -> None:
        self.traffic = Traffic(nodes_of)
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.waits: Counter[tuple[str, Site]] = Counter()
        self.copies = {to_host: [0, 0, 0] for to_host in (False, True)}
        """Number, bytes, and how many of them the host waits for."""
        self.operations = 0
        self.begin = time.perf_counter()

    def section(self, name: str, memory: Memory, staged: int) -> Section:
        """The tally as a record."""
        return Section(
            name=name,
            memory=memory,
            flops=Flops(*(self.flops[kind] for kind in ("forward", "backward", "recomputed"))),
            collectives=self.traffic.account(),
            copies=Copies(*self.copies[False]),
            copies_to_host=Copies(*self.copies[True]),
            staged=staged,
            waits=tuple(Wait(*key, count) for key, count in self.waits.most_common()),
            operations=self.operations,
            seconds=time.perf_counter() - self.begin,
        )


class Counters(TorchDispatchMode):
    """Counts inside its `with` block, which may be the whole life of a model.

    This class counts around the real tensors of the CPU, all of which are the device's memory then.
    """

    def __init__(self, nodes_of: int = 8) -> None:
        """`nodes_of`: ranks on a node."""
        super().__init__()
        self.memory = Ledger()
        self.staged = Ledger()
        """What stands in host memory on its way from the device, or from a file to it."""
        self.sections: list[Section] = []
        self._nodes_of = nodes_of
        self._tally = _Tally(nodes_of)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What is counted in the `with` block becomes a section of this name, and is in none around it."""
        self._take("between")
        yield
        self._take(name)

    def _take(self, name: str) -> None:
        """Let a section of this name end here, unless nothing was counted in it."""
        if self._tally.operations:
            self.sections.append(self._tally.section(name, self.memory.account(), self.staged.peak))
        self.memory.begin()
        self.staged.begin()
        self._tally = _Tally(self._nodes_of)

    def take_sections(self) -> tuple[Section, ...]:
        """All sections since the last call; what was counted outside of named ones is called `between`."""
        self._take("between")
        taken = tuple(self.sections)
        self.sections.clear()
        return taken

    def wait(self, what: str) -> None:
        """Count a wait of the host for the device, at the line that is being run."""
        self._tally.waits[what, here()] += 1

    def count_copy(self, size: int, is_asynchronous: bool) -> None:
        """Count a copy of so many bytes from the host to the device."""
        self._count_copy(size, to_host=False, waits=not is_asynchronous)
        if not is_asynchronous:
            self.wait("blocking copy")

    def count_copy_to_host(self, copy: Tensor) -> None:
        """Count a copy from the device, which the host waits for; `copy`: in host memory."""
        self.staged.add(copy)
        self._count_copy(copy.nbytes, to_host=True, waits=True)
        self.wait("copy to the host")

    def _count_copy(self, size: int, to_host: bool, waits: bool) -> None:
        counts = self._tally.copies[to_host]
        for i, count in enumerate((1, size, int(waits))):
            counts[i] += count

    def count_message(self, func: Any, args: tuple) -> None:
        """Count a message to other ranks."""
        self._tally.traffic.add(func, args)

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        self._tally.operations += 1
        if func.namespace == "c10d":
            return self.communicate(func, args, kwargs)
        out = self.execute(func, args, kwargs)
        flops = flops_of(func, args, kwargs, self.values_of)
        if flops:
            self._tally.flops[_kind_of_pass()] += flops
        return out

    # -- what depends on the device --------------------------------------------------------------------------------

    def execute(self, func: Any, args: tuple, kwargs: dict) -> object:
        """Run an operator, and count the memory that it is given and that it makes."""
        if here().file == _COLLECTIVES:  # gloo adds up in a copy of its own, which NCCL does not take
            return func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # what comes from numpy is no operator's result
                self.memory.add(leaf)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.memory.add(leaf)
        return out

    def communicate(self, func: Any, args: tuple, kwargs: dict) -> object:
        """Run an operator that exchanges something with other ranks."""
        self.count_message(func, args)
        return func(*args, **kwargs)

    def values_of(self, numbers: Tensor) -> list[int] | None:
        """The values of a small tensor of whole numbers, if they are known."""
        values: list[int] = numbers.tolist()
        return values


def _kind_of_pass() -> str:
    """forward, backward or recomputed: which pass the present operator belongs to."""
    if graph_task() == -1:
        return "forward"
    # Layers that are run again are run inside of a backward pass, as are the logits.
    return "recomputed" if innermost_of(_PASSES) in ("forward", "logits") else "backward"
