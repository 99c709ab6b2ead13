"""Where the ranks of a job meet: the store at MASTER_ADDR, and the watch over whoever came."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta

import torch.distributed as dist

from megatron_ssft.errors import LostRank, UserError
from megatron_ssft.parallel.watch.board import Board, Facts
from megatron_ssft.parallel.watch.watch import Watch

_MORE = timedelta(minutes=2)
_meetings = itertools.count()
"""A process may meet the others again; every rank does so as often."""


def meet(rank: int, world_size: int, timeout: timedelta, slow: timedelta, facts: Facts) -> tuple[dist.Store, Watch]:
    """The store for the process group, and the watch, when all ranks are there and agree on `facts`.

    Args:
        timeout: for a rank that does not come, gives no sign of life, or stands still.
        slow: for one that stands still in a phase with slow work.

    Raises:
        LostRank: not all came in time.
        UserError: the ranks disagree on `facts`.
    """
    if "MASTER_ADDR" not in os.environ:  # a single process without a launcher has no address to meet at
        return dist.HashStore(), Watch()
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT {port!r}: must be a port from 1 to 65535, as MASTER_ADDR is set")
    place = f"{address}:{port}"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        default = dist.PrefixStore("default_pg", store)
        if world_size == 1:
            return default, Watch()
        # Its own time limit is never reached: the watch is faster, and names who is missing.
        own = dist.TCPStore(address, int(port), is_master=False, timeout=2 * timeout + _MORE, wait_for_workers=False)
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        if rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {port}: is in use on {address}; choose another port") from error
        raise LostRank(f"rank {rank} cannot reach rank 0 at {place} (MASTER_ADDR, MASTER_PORT): {reason}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    board = Board(dist.PrefixStore(f"watch {attempt} {next(_meetings)}", own), rank, world_size)
    watch = Watch(board, timeout.total_seconds(), slow.total_seconds(), f"the store at {place}")
    watch.start(facts)
    return default, watch
