"""torch's flight recorder: the last collectives of each rank, written where the watch ends a job that stands still.

NCCL writes it at its own time limit, which lies behind the watch's. So the watch writes it, into the same files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Variables that name the files, each rank's number behind it; the second one is the name before torch 2.9."""
_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Variables that switch the recorder on: how many collectives it keeps."""


def dump_prefix(environment: Mapping[str, str]) -> str | None:
    """How the names of the recorder's files begin; None where it is off, or nobody said where they are to be."""
    is_on = any(environment.get(name, "0") not in ("", "0") for name in _SIZES)
    named = next((environment[name] for name in _FILES if environment.get(name)), None)
    return named if is_on else None


def remark(environment: Mapping[str, str] | None = None) -> str:
    """What a message about a hang says of the files; may be nothing."""
    prefix = dump_prefix(os.environ if environment is None else environment)
    if prefix is None:
        return ""
    return f"; the flight recorder of each rank, with its last collectives: {prefix}* (torchfrtrace reads them)"


def write_dump(rank: int, seconds: float) -> None:
    """Write what the recorder of this rank holds, unless NCCL has; give up after so many seconds."""
    prefix = dump_prefix(os.environ)
    if prefix is None:
        return
    # NCCL's lock may be held by a thread that hangs.
    writing = threading.Thread(target=_write, args=(Path(f"{prefix}{rank}"),), daemon=True)
    writing.start()
    writing.join(seconds)


def _write(path: Path) -> None:
    backend = dist.get_backend() if dist.is_initialized() else ""
    functions = torch._C._distributed_c10d
    dump = getattr(functions, "_dump_nccl_trace" if backend == "nccl" else "_dump_fr_trace", None)
    if dump is None or path.exists():
        return
    try:
        content = dump()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except (OSError, RuntimeError):  # the message about the hang is what counts, and is still to be said
        path.unlink(missing_ok=True)
