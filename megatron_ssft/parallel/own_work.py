"""How long a rank works for itself: its time in the engine, without what it spends waiting in collectives.

In synchronous training all ranks end a step together, so the step's time says nothing about one of them. A rank that is
slow works while the others wait for it, in the tensor-parallel collectives of a layer, at a pipeline's border, or at
the reduction of gradients. So collectives are timed where all of them pass: at torch's process groups.

On the CPU the host's clock is read around each. On a GPU two events are put on the current stream, so that their
distance is how long the stream stood still for the collective, transfer included; nothing waits for them until the
step has ended. There time in which the GPU had nothing to do, as the host was late, is the rank's own.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup, Work

from megatron_ssft.parallel.device import is_gpu

_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "barrier", "gather", "scatter", "send", "recv"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "recv_anysource"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("all_to_all_single", "_end_coalescing"),
)
"""Methods of a process group, as far as this torch has them."""


class Marks(Protocol):
    """A source of marks in time."""

    def mark(self) -> Any:
        """The present moment."""

    def seconds(self, spans: list[tuple[Any, Any]]) -> float:
        """Length of all spans together."""

    def settle(self) -> None:
        """Wait until all marks are set."""

    def start_over(self) -> None:
        """Forget all marks, which may be used again."""


class HostMarks:
    """By the host's clock."""

    def mark(self) -> int:
        """The present moment in nanoseconds."""
        return time.perf_counter_ns()

    def seconds(self, spans: list[tuple[int, int]]) -> float:
        """Length of all spans together."""
        return sum(end - begin for begin, end in spans) / 1e9

    def settle(self) -> None:
        """They are set at once."""

    def start_over(self) -> None:
        """Nothing is kept."""


class StreamMarks:
    """By events on the current CUDA stream, used again and again."""

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        """`new_event`: by default makes events of CUDA."""
        self._new_event = new_event or functools.partial(torch.cuda.Event, enable_timing=True)
        self._events: list[Any] = []
        self._used = 0

    def mark(self) -> Any:
        """An event that is recorded when the stream gets here."""
        if self._used == len(self._events):
            self._events.append(self._new_event())
        event = self._events[self._used]
        self._used += 1
        event.record()
        return event

    def seconds(self, spans: list[tuple[Any, Any]]) -> float:
        """Length of all spans together."""
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    def settle(self) -> None:
        """Wait for the last event, and so for all of the stream's."""
        if self._used:
            self._events[self._used - 1].synchronize()

    def start_over(self) -> None:
        """The next marks use the same events."""
        self._used = 0


class OwnWork:
    """Of this rank, from step to step."""

    def __init__(self, device: torch.device, marks: Marks | None = None) -> None:
        """`marks`: by default those of the device."""
        _install()
        self._marks: Marks = marks or (StreamMarks() if is_gpu(device) else HostMarks())
        self._inside: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._is_on = False
        self.collectives = 0
        """Calls and waits that were timed since the last `take`."""

    def start(self) -> None:
        """Count from here on. Before, nothing is kept, as nobody may ever ask for it."""
        self._is_on = True
        self.take()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the time inside the `with` block as work, without that of collectives. Blocks do not nest."""
        global _counting
        if not self._is_on:
            yield
            return
        begin = self._marks.mark()
        before, _counting = _counting, self
        try:
            yield
        finally:
            _counting = before
            self._inside.append((begin, self._marks.mark()))

    def timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call that waits for other ranks."""
        begin = self._marks.mark()
        try:
            return call(*args, **kwargs)
        finally:
            self._waits.append((begin, self._marks.mark()))

    def take(self) -> float:
        """Seconds of own work since the last call. Waits for the GPU's stream, which a step leaves empty."""
        inside, self._inside = self._inside, []
        waits, self._waits = self._waits, []
        self.collectives = len(waits)
        self._marks.settle()
        seconds = self._marks.seconds(inside) - self._marks.seconds(waits)
        self._marks.start_over()
        return max(0.0, seconds)


_counting: OwnWork | None = None
"""Whose block this process is in. Backward passes on a GPU call collectives from a thread of autograd's."""


@functools.cache
def _install() -> None:
    """Let every collective of this process pass by here, once and for all."""
    for name in _COLLECTIVES:
        if hasattr(ProcessGroup, name):
            setattr(ProcessGroup, name, _passing(getattr(ProcessGroup, name)))
    # A process group only begins some of them; who waits for the result is held up here.
    Work.wait = _passing(Work.wait)  # type: ignore[method-assign]


def _passing(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def passing(*args: Any, **kwargs: Any) -> Any:
        counting = _counting
        return call(*args, **kwargs) if counting is None else counting.timed(call, *args, **kwargs)

    return passing
