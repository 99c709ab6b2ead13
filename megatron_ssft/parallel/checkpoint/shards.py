"""Whether all files that the ranks wrote stand in the folder that is about to be published."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from megatron_ssft.errors import UserError
from megatron_ssft.formats.manifest import FileRecord
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_foreign_pickles
from megatron_ssft.parallel.shared_folder import SEEN_SECONDS

_LOOK_SECONDS = 0.2


class WrittenShards(Struct, frozen=True, kw_only=True):
    """What one rank wrote."""

    host: str
    files: dict[str, FileRecord]


def complete_shards(folder: Path, shards: Sequence[WrittenShards]) -> dict[str, FileRecord]:
    """The files of all ranks, which stand in the folder as they were written; waits for them as long as that may take.

    Raises:
        UserError: one is not there (ranks that write to a disk of their own node, mostly), or the metadata names a
            shard that nobody wrote.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    files: dict[str, FileRecord] = {}
    for rank, told in enumerate(shards):
        for name, record in told.files.items():
            while not _is_there(folder / name, record.size):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder.parent}: rank {rank} on {told.host} wrote {name}, which the first rank does not "
                        "see; no checkpoint is published; --save must be one folder for all nodes"
                    )
                time.sleep(_LOOK_SECONDS)
        files |= told.files
    named = {place.relative_path for place in refuse_foreign_pickles(folder).storage_data.values()}
    if missing := sorted(named - files.keys()):
        raise UserError(
            f"{folder / missing[0]}: the metadata names it, but no rank wrote it; no checkpoint is published"
        )
    return files


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
