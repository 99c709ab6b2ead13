"""Lets megatron-core run without CUDA: its hard-wired CUDA calls are answered by the CPU.

megatron-core 0.16 creates tensors with `device="cuda"`, asks for the current CUDA device and keeps CUDA random
states. On a machine without CUDA these calls are mapped to CPU equivalents, process-wide, so that the same
training code runs on gloo. It cannot be switched on where CUDA is available, unless --device cpu asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


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
    _patch_torch_cuda()
    _patch_megatron_rng()
    mode = _CudaToCpu()
    mode.__enter__()  # stays for the life of the process
    _installed.append(mode)


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"`, `.cuda()`, `.to("cuda")`, and the type names mixed-precision optimizers compare."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(a) else a for a in args)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _Stream:
    """Stands in for a CUDA stream: on the CPU everything is in order already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


def _patch_torch_cuda() -> None:
    def nothing(*args: object, **kwargs: object) -> None: ...

    stand_ins: dict[str, object] = {
        "current_device": lambda: _CPU,
        "synchronize": nothing,
        "set_device": nothing,
        "empty_cache": nothing,
        "Stream": _Stream,  # a class: libraries name it in annotations
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: None,  # the CPU generator is seeded by its own call
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "memory_allocated": lambda *args, **kwargs: 0,
        "max_memory_allocated": lambda *args, **kwargs: 0,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)


def _patch_megatron_rng() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
