"""Where the ranks of a job meet: the store at MASTER_ADDR, and the watch over whoever came."""

from __future__ import annotations

import itertools
import os
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_ssft.errors import LostRank, UserError
from megatron_ssft.parallel.watch.board import Board, Facts
from megatron_ssft.parallel.watch.reach import Unreachable, await_listener, quiet_unless_done, within
from megatron_ssft.parallel.watch.watch import Watch

_MORE = timedelta(minutes=2)
_CONNECT = timedelta(minutes=1)
"""At most, for a store whose port is open: torch takes up to three times as long."""
_LEAST_SECONDS = 2.0
"""For a store that was late to listen."""
_meetings = itertools.count()
"""A process may meet the others again; every rank does so as often."""


def meet(rank: int, world_size: int, timeout: timedelta, slow: timedelta, facts: Facts) -> tuple[dist.Store, Watch]:
    """The store for the process group, and the watch, when all ranks are there and agree on `facts`.

    A process that is alone meets nobody, wherever MASTER_ADDR points.

    Args:
        timeout: for a rank that does not come, gives no sign of life, or stands still; and for MASTER_ADDR to answer.
        slow: for one that stands still in a phase with slow work.

    Raises:
        LostRank: MASTER_ADDR does not answer, or not all came in time.
        UserError: the ranks disagree on `facts`, or there is no place to meet at.
    """
    if world_size == 1:
        return dist.HashStore(), Watch()
    address, port = _meeting_place()
    place = f"{address}:{port}"
    store = _store_at(address, port, rank, timeout)
    store.set_timeout(timeout)
    # Its own time limit is never reached: the watch is faster, and names who is missing.
    own = dist.TCPStore(address, port, is_master=False, timeout=2 * timeout + _MORE, wait_for_workers=False)
    meeting = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {next(_meetings)}"
    board = Board(dist.PrefixStore(f"watch {meeting}", own), rank, world_size)
    watch = Watch(board, timeout.total_seconds(), slow.total_seconds(), f"the store at {place}")
    watch.start(facts)
    return dist.PrefixStore(f"default_pg {meeting}", store), watch


def _meeting_place() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT. Raises UserError."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port:
        raise UserError("MASTER_ADDR and MASTER_PORT are not set; see examples/slurm for a job script that does")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT {port!r}: must be a port from 1 to 65535, as MASTER_ADDR is set")
    return address, int(port)


def _store_at(address: str, port: int, rank: int, timeout: timedelta) -> dist.Store:
    """The store that rank 0 or its launcher keeps. Raises LostRank, UserError."""
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    seconds, begin = timeout.total_seconds(), time.monotonic()

    def connect() -> dist.Store:
        # Who is missing is the watch's to say, so the store waits for nobody.
        limit = min(timeout / 3, _CONNECT)
        return dist.TCPStore(
            address, port, is_master=keeps, timeout=limit, wait_for_workers=False, multi_tenant=True
        )  # fmt: skip

    try:
        if not keeps:
            await_listener(address, port, seconds)
        with quiet_unless_done():
            return within(max(_LEAST_SECONDS, seconds - (time.monotonic() - begin)), connect)
    except (Unreachable, dist.DistError) as error:
        if keeps and "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {port}: is in use on {address}; choose another port") from error
        reason = str(error) if isinstance(error, Unreachable) else "what answers there is not the store of this job"
        if keeps:
            reason = "rank 0 keeps the store itself, but the address does not lead to its host"
        raise LostRank(
            f"rank {rank} cannot reach rank 0 at {address}:{port} (MASTER_ADDR, MASTER_PORT) within "
            f"{timeout.total_seconds():.0f} s (--distributed-timeout-minutes): {reason}"
        ) from error
