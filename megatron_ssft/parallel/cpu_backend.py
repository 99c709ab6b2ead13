"""Lets megatron-core run without CUDA: its hard-wired CUDA calls are answered by the CPU.

Process-wide, so that the same training code runs on gloo. It cannot be switched on where CUDA is available, unless
--device cpu asks for it.
"""

from __future__ import annotations

import torch

from megatron_ssft.parallel.cuda_calls import CudaCalls

_installed: list[CudaCalls] = []


def install_cpu_backend(hide_cuda: bool = False) -> None:
    """Map megatron-core's CUDA calls to the CPU. Does nothing when already installed.

    Args:
        hide_cuda: somebody asked for the CPU; from then on torch says that there is no CUDA.

    Raises:
        RuntimeError: CUDA is available and not to be hidden; mixing devices silently would be worse than stopping.
    """
    if _installed:
        return
    if hide_cuda:
        torch.cuda.is_available = lambda: False
        torch.cuda.device_count = lambda: 0
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend must not be installed on a machine with CUDA")
    calls = CudaCalls(torch.device("cpu"))
    calls.install()  # stays for the life of the process
    _installed.append(calls)
