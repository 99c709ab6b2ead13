"""Ranks that the others wait for, from how long each works for itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ssft.parallel.watch.judgement import ranks_text

FACTOR = 1.2
"""A rank is slow that works longer than this times the median of its peers."""
STEPS = 5
"""In so many steps, one after the other, before it is said."""
LEAST_SECONDS = 0.05
"""And by at least so much longer: tiny steps vary."""


@dataclass(frozen=True)
class Seat:
    """Where a rank works."""

    host: str
    stage: int
    """Pipeline stage. Its peers are the ranks of the same stage, which hold as many layers."""


@dataclass(frozen=True)
class Slowest:
    """The rank of a step that is furthest above the median of its peers."""

    rank: int
    host: str
    seconds: float
    """Of its own work."""
    median: float
    """Of its peers' own work; the lower one of two."""


class Stragglers:
    """Follows the ranks of a run. A rank that stays slow is named once."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats = seats
        stages = {seat.stage for seat in seats}
        self._peers = [[rank for rank, seat in enumerate(seats) if seat.stage == stage] for stage in sorted(stages)]
        self._slow_steps = [0] * len(seats)
        self._named: set[int] = set()

    def look(self, seconds: Sequence[float]) -> tuple[Slowest, str | None]:
        """The slowest rank of a step, and a line where ranks are found to be slow by now.

        Args:
            seconds: own work in this step, by rank.
        """
        medians = [0.0] * len(seconds)
        for peers in self._peers:
            # Half of the ranks may be slow, and the other half still is the measure.
            median = statistics.median_low([seconds[rank] for rank in peers])
            for rank in peers:
                medians[rank] = median
        for rank, (own, median) in enumerate(zip(seconds, medians)):
            is_slow = own > FACTOR * median and own - median > LEAST_SECONDS
            self._slow_steps[rank] = self._slow_steps[rank] + 1 if is_slow else 0
        rank = max(range(len(seconds)), key=lambda r: seconds[r] / max(medians[r], 1e-9))
        slowest = Slowest(rank, self._seats[rank].host, seconds[rank], medians[rank])
        found = [r for r, steps in enumerate(self._slow_steps) if steps >= STEPS and r not in self._named]
        self._named.update(found)
        return slowest, self._line(found, seconds, medians) if found else None

    def _line(self, ranks: list[int], seconds: Sequence[float], medians: Sequence[float]) -> str:
        hosts = list(dict.fromkeys(self._seats[rank].host for rank in ranks))
        worst = max(ranks, key=lambda r: seconds[r] / max(medians[r], 1e-9))
        shown = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
        return (
            f"slow: {ranks_text(ranks)} on {shown} worked more than {FACTOR:g} times as long as the median of the same "
            f"pipeline stage in each of the last {STEPS} steps (now {seconds[worst]:.2f} s, median "
            f"{medians[worst]:.2f} s); the others wait for it"
        )
