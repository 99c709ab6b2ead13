"""Where ranks write their places: keys in the TCP store that the ranks meet at, through a connection of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import torch.distributed as dist

from megatron_ssft.parallel.watch.judgement import Place, ranks_text

Facts = Mapping[str, str]
"""What has to be the same on every rank, by name."""
_POLL_SECONDS = 0.05
_POLLS_PER_LOOK = 10
"""How often the ranks look, while they wait for each other, whether one of them has given up."""
_SHOWN = 20
"""Differences that a refusal shows."""


class Board:
    """This rank's connection. A call may block for ever where the store's process is stopped."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self.rank = rank
        self.world_size = world_size
        self.is_closed = False
        """Set from outside: `join` gives up."""

    # -- the start -----------------------------------------------------------------------------------------------

    def join(self, place: Place, facts: Facts) -> str:
        """Wait until all ranks are here, and compare what they have to agree on; what differs, in words, or "".

        Raises ConnectionAbortedError where the board was closed meanwhile, or a rank has told that one is missing.
        """
        if self.rank == 0:
            self._store.set("verdict", "")
            self._store.set("facts", msgspec.json.encode(dict(facts)).decode())
        self.write(place)
        self._count("joined")
        self._wait("joined is complete")
        expected = msgspec.json.decode(self._store.get("facts"), type=dict[str, str])
        differing = {key for key in {*expected, *facts} if expected.get(key) != facts.get(key)}
        ours = {key: facts.get(key, "absent") for key in sorted(differing)}
        self._store.set(f"differs {self.rank}", msgspec.json.encode(ours).decode())
        self._count("compared")
        if self.rank == 0:
            self._wait("compared is complete")
            self._store.set("differences", self._differences(expected))
        self._wait("differences")
        differences = self._store.get("differences").decode()
        self._count("told")
        if self.rank == 0 and differences:  # the store may go with this process, which ends now
            self._wait("told is complete")
        return differences

    def absent(self) -> list[int]:
        """The ranks that have not come, or not answered since."""
        key = "differs" if self._store.check(["joined is complete"]) else "place"
        return [rank for rank in range(self.world_size) if not self._store.check([f"{key} {rank}"])]

    def _count(self, what: str) -> None:
        if self._store.add(what, 1) == self.world_size:
            self._store.set(f"{what} is complete", "")

    def _wait(self, key: str) -> None:
        polls = 0
        while not self._store.check([key]):
            polls += 1
            if self.is_closed or (polls % _POLLS_PER_LOOK == 0 and self._is_told()):
                raise ConnectionAbortedError
            time.sleep(_POLL_SECONDS)

    def _is_told(self) -> bool:
        return self._store.check(["verdict"]) and self._store.get("verdict") != b""

    def _differences(self, expected: Facts) -> str:
        raw = self._store.multi_get([f"differs {rank}" for rank in range(self.world_size)])
        by_rank = [msgspec.json.decode(text, type=dict[str, str]) for text in raw]
        places = self.read_all()
        lines = []
        for key in sorted({key for differing in by_rank for key in differing}):
            holders: dict[str, list[int]] = {}
            for rank, differing in enumerate(by_rank):
                holders.setdefault(differing.get(key, expected.get(key, "absent")), []).append(rank)
            lines.append(f"{key}: " + ", ".join(f"{value} on {_where(r, places)}" for value, r in holders.items()))
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        return "; ".join(lines[:_SHOWN] + more)

    # -- from then on --------------------------------------------------------------------------------------------

    def write(self, place: Place) -> None:
        """Say where this rank stands."""
        self._store.set(f"place {self.rank}", msgspec.json.encode(place).decode())

    def read(self, ranks: list[int]) -> tuple[dict[int, Place], str]:
        """The places of some ranks, and what a rank has found wrong with the job, or ""."""
        *raw, verdict = self._store.multi_get([*(f"place {rank}" for rank in ranks), "verdict"])
        places = {rank: msgspec.json.decode(text, type=Place) for rank, text in zip(ranks, raw)}
        return places, verdict.decode()

    def read_all(self) -> dict[int, Place]:
        """The places of all ranks."""
        return self.read(list(range(self.world_size)))[0]

    def is_first_to_tell(self, verdict: str) -> bool:
        """Tell all ranks what is wrong with the job. False where another rank has told them already.

        Where the store has gone with its process no rank knows of another's verdict: True.
        """
        own = f"[rank {self.rank}] {verdict}"  # told apart from the same words of another rank
        try:
            told = self._store.compare_set("verdict", "", own)
        except RuntimeError:
            return True
        return told.decode() == own


def _where(ranks: list[int], places: Mapping[int, Place]) -> str:
    hosts = list(dict.fromkeys(places[rank].host for rank in ranks))
    return f"{ranks_text(ranks)} ({', '.join(hosts[:3])}{' ...' if len(hosts) > 3 else ''})"
