"""What a step took: time by part, memory, and the rank that the others waited for. One small collective per step."""

from __future__ import annotations

import socket

import msgspec

from megatron_ssft.objectives.objective import Figures
from megatron_ssft.parallel.collectives import gather_integers, gather_json
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.memory import memory_figures
from megatron_ssft.training.stragglers import Seat, Stragglers


class StepMeter:
    """Measures from the end of one step to the end of the next, on every rank."""

    def __init__(self, engine: Engine) -> None:
        """Learn where the ranks work. Collective."""
        self._engine = engine
        self._topology = engine.topology
        self._stragglers: Stragglers | None = None
        if self._topology.world_size > 1:
            seats = gather_json({"host": socket.gethostname(), "stage": self._topology.stage}, self._topology)
            self._stragglers = Stragglers([msgspec.convert(seat, Seat) for seat in seats])

    def begin(self) -> None:
        """Measure from here on. What lies before is no step's."""
        self._engine.own_work.start()
        memory_figures(self._topology.device)
        self._engine.clock.lap()

    def end_step(self) -> tuple[Figures, str | None]:
        """Figures of the step for its line in metrics.jsonl, and a line about slow ranks, if any. Collective.

        The times by part are this rank's own.
        """
        memory = memory_figures(self._topology.device)
        own = round(1e9 * self._engine.own_work.take())
        figures: Figures = {}
        line = None
        if self._stragglers is not None:
            gathered = gather_integers([own, *memory.values()], self._topology)
            memory = dict(zip(memory, gathered[:, 1:].max(axis=0).tolist()))
            if self._topology.is_first_rank:  # whose log it is
                slowest, line = self._stragglers.look((gathered[:, 0] / 1e9).tolist())
                figures = {
                    "slowest_rank": slowest.rank,
                    "slowest_host": slowest.host,
                    "slowest_work_seconds": slowest.seconds,
                    "median_work_seconds": slowest.median,
                }
        parts = self._engine.clock.lap()
        times = {f"{name}_seconds": seconds for name, seconds in parts.items()}
        return {"wall_seconds": sum(parts.values()), **times, **memory, **figures}, line
