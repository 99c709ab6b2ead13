"""Whether all ranks of a job see one and the same folder: a node's own disk makes checkpoints worthless."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path

from megatron_ssft.formats.files import naming
from megatron_ssft.parallel.collectives import gather_json, on_first_rank, raise_together
from megatron_ssft.parallel.topology import Topology

SEEN_SECONDS = 70.0
"""A shared file system may show a new file of another node so late: NFS keeps a folder's names for up to 60 s."""
_LOOK_SECONDS = 0.2


def require_shared(folder: Path, topology: Topology, flag: str) -> None:
    """Raise UserError on every rank unless each reads what the first writes into the folder. Collective.

    `flag`: by which the folder was given, for messages.
    """
    # The ending lets the next start remove it after a kill.
    nonce, name = on_first_rank(lambda: [secrets.token_hex(16), f".seen.{secrets.token_hex(4)}.tmp"], topology)
    probe = folder / name

    def write() -> None:
        try:
            with naming(folder):
                probe.write_text(nonce, encoding="ascii")
        except OSError:  # a full disk, which has room for the name only
            remove()
            raise

    def remove() -> None:
        probe.unlink(missing_ok=True)

    on_first_rank(write, topology)
    seen = [socket.gethostname(), _reads(probe, nonce)]
    told = gather_json(seen, topology)
    on_first_rank(remove, topology)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(told) if not sees]
    problem = None
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        problem = (
            f"{flag}{folder}: {blind[0]}{more} does not see what the first rank on {told[0][0]} writes there; give a "
            "folder that all nodes share"
        )
    raise_together(problem, topology)


def _reads(path: Path, text: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="ascii", errors="replace") == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
