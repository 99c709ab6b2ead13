"""The lease on the folder that a job writes, for all its ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.lease import Lease, acquire
from megatron_ssft.formats.run_folder import clear_leftovers
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.shared_folder import require_shared
from megatron_ssft.parallel.topology import Topology


class FolderLease:
    """What the ranks of a job know of its lease; the first rank holds it."""

    def __init__(self, topology: Topology, lease: Lease | None) -> None:
        self._topology = topology
        self._lease = lease

    @property
    def is_lost(self) -> bool:
        """Whether this rank held the lease, and another job has the folder by now, or nobody. Not collective.

        Raises OSError where that cannot be seen.
        """
        if self._lease is None:
            return False
        try:
            self._lease.check()
        except UserError:
            return True
        return False

    def check(self) -> None:
        """Raise UserError on every rank where another job has the folder by now. Collective."""
        on_first_rank(lambda: self._lease.check() if self._lease else None, self._topology)


@contextlib.contextmanager
def hold_folder(folder: str | Path | None, topology: Topology, flag: str = "") -> Iterator[FolderLease]:
    """Hold the lease on a folder inside the `with` block; None: there is nothing to hold. Collective.

    Args:
        flag: by which the folder was given, for messages.

    Raises:
        UserError: another job holds it, it cannot be written, or not all ranks see it.
    """
    held: list[Lease] = []

    def take() -> None:
        if folder is not None:
            held.append(acquire(Path(folder), flag))
            clear_leftovers(Path(folder))

    on_first_rank(take, topology)
    try:
        if folder is not None:
            require_shared(Path(folder), topology, flag)
        yield FolderLease(topology, held[0] if held else None)
    finally:
        for lease in held:
            lease.release()
