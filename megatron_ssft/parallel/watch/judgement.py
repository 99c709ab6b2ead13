"""When a rank counts as lost or stuck, from what ranks say of themselves, and the words for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msgspec import Struct

ADVICE = "start the job again with --load to go on from its newest checkpoint"


class Place(Struct, frozen=True, kw_only=True):
    """Where a rank stands, as it says itself."""

    host: str
    pid: int
    step: int = 0
    """Optimizer step under way, from 1; 0 before the first."""
    phase: str = "starting"
    is_slow: bool = True
    """Whether the phase has work that may take one rank long."""
    is_waiting: bool = False
    """Whether it waits for the other ranks."""
    moves: int = 0
    """Counts whatever it begins or ends; does not change while it stands still."""
    beat: int = 0
    """Counts the signs of life; does not change where the process is stopped or dead."""
    has_left: bool = False
    """Whether it ended, well or not."""

    def __str__(self) -> str:
        at = f"step {self.step}, {self.phase}" if self.step else self.phase
        return f"{at}, waiting for other ranks" if self.is_waiting else at


@dataclass(frozen=True)
class Limits:
    """How long a rank may be silent or stand still, in seconds."""

    silence: float
    """Without a sign of life, or without a move in a phase that is not slow."""
    slow: float
    """Without a move in a slow phase."""
    beat: float
    """Between two signs of life."""


class Judge:
    """Follows the places of ranks over time. Time in which this process itself was stopped does not count."""

    def __init__(self, limits: Limits, store: str) -> None:
        """`store`: where the ranks' signs of life are kept, for messages."""
        self._limits = limits
        self._store = store
        self._round = -1
        self._round_age = 0.0
        self._beats: dict[int, tuple[int, float]] = {}
        self._moves: dict[int, tuple[int, float]] = {}

    def look(self, places: Mapping[int, Place], rounds: int, seconds: float) -> str | None:
        """What is wrong with the job by now, in one line; None: nothing.

        Args:
            places: the newest known place of each rank that this one looks at, its own among them.
            rounds: how often the places have been read from the store.
            seconds: since the last look.
        """
        self._round_age = 0.0 if rounds != self._round else self._round_age + seconds
        is_new, self._round = rounds != self._round, rounds
        present = {rank: place for rank, place in places.items() if not place.has_left}
        for rank, place in present.items():
            self._beats[rank] = _age(self._beats.get(rank), place.beat, seconds if is_new else 0.0)
            self._moves[rank] = _age(self._moves.get(rank), place.moves, seconds)
        return self._silent(present) or self._still(present)

    def _silent(self, places: Mapping[int, Place]) -> str | None:
        if self._round_age > self._limits.silence:
            first = described({0: places[0]}) if 0 in places else "rank 0"
            return (
                f"no answer for {duration(self._round_age)} (--distributed-timeout-minutes) from {first}, or from the "
                f"launcher: {self._store} is kept by one of the two; {ADVICE}"
            )
        silent = {rank: place for rank, place in places.items() if self._beats[rank][1] > self._limits.silence}
        if not silent:
            return None
        age = duration(max(self._beats[rank][1] for rank in silent))
        return f"no sign of life for {age} (--distributed-timeout-minutes) from {described(silent)}; {ADVICE}"

    def _still(self, places: Mapping[int, Place]) -> str | None:
        overdue = [rank for rank, place in places.items() if self._moves[rank][1] > self._limit(place)]
        if not overdue:
            return None
        flag = "--slow-work-timeout-minutes" if places[overdue[0]].is_slow else "--distributed-timeout-minutes"
        age = duration(max(self._moves[rank][1] for rank in overdue))
        # Whoever waits is held up by those that do not, and everybody by a rank that is stopped.
        silent = {r: p for r, p in places.items() if self._beats[r][1] > _MISSED_BEATS * self._limits.beat}
        working = {rank: place for rank, place in places.items() if not place.is_waiting}
        return f"no progress for {age} ({flag}) by {described(silent or working or places)}; {ADVICE}"

    def _limit(self, place: Place) -> float:
        return self._limits.slow if place.is_slow else self._limits.silence


def _age(before: tuple[int, float] | None, count: int, seconds: float) -> tuple[int, float]:
    """A count and for how long it has been the same."""
    if before is None or before[0] != count:
        return count, 0.0
    return count, before[1] + seconds


def described(places: Mapping[int, Place]) -> str:
    """The ranks with their places, those at the same place together."""
    by_place: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        by_place.setdefault(str(place), []).append(rank)
    return "; ".join(
        f"{_named(ranks, places)}, last seen at {place}" for place, ranks in list(by_place.items())[:_SHOWN]
    ) + (f"; and {len(by_place) - _SHOWN} more" if len(by_place) > _SHOWN else "")


_MISSED_BEATS = 5
"""A rank that missed so many is stopped or dead, rather than late."""
_SHOWN = 8
"""Different places, or ranks of a list, that a message shows."""


def _named(ranks: list[int], places: Mapping[int, Place]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} (process {places[ranks[0]].pid} on {places[ranks[0]].host})"
    return ranks_text(ranks)


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    single = len(runs) == 1 and runs[0][0] == runs[0][1]
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:_SHOWN])
    return f"rank{'' if single else 's'} {shown}" + (f" and {len(runs) - _SHOWN} more" if len(runs) > _SHOWN else "")


def duration(seconds: float) -> str:
    """Seconds or minutes for a person."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
