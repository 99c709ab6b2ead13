"""How much memory this rank uses."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from megatron_ssft.parallel.device import is_gpu

_STATM = Path("/proc/self/statm")


def memory_figures(device: torch.device) -> dict[str, int]:
    """Bytes by name. Peaks of the GPU are those since the last call; that of the process is its highest so far.

    Reserved memory is what torch's allocator holds, in use or not. The resident set size (RSS) is host memory.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resident = int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    figures = {"peak_rss_bytes": max(peak, resident), "rss_bytes": resident}  # Linux counts them at different times
    if is_gpu(device):
        figures |= {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
    return figures
