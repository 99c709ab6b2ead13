"""Calls of CUDA that another device answers: megatron-core's hard-wired ones, and what torch.cuda says of itself.

megatron-core 0.16 creates tensors with `device="cuda"`, asks for the current CUDA device and keeps CUDA random
states. Where another device stands for the GPU (the CPU, or a simulated one), these calls are mapped to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CudaCalls(TorchFunctionMode):
    """Rewrites `device="cuda"`, `.cuda()`, `.to("cuda")`, and the type names mixed-precision optimizers compare.

    It is in force between `install` and `remove`, in the whole process.
    """

    def __init__(
        self,
        device: torch.device,
        waits: Callable[[str], None] | None = None,
        answers: Mapping[str, object] | None = None,
        pin: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            device: what stands for the GPU.
            waits: told what the host waits for, wherever it would wait for the GPU.
            answers: further names of torch.cuda, and what takes their place.
            pin: gives a tensor of the host a copy in page-locked memory; by default there is no such memory.
        """
        super().__init__()
        self._device = device
        self._waits = waits or (lambda what: None)
        self._answers = answers or {}
        self._pin = pin or (lambda tensor: tensor)
        self._replaced: list[tuple[Any, str, object]] = []
        self._type_names = {f"torch.{'' if device.type == 'cpu' else device.type + '.'}": "torch.cuda."}

    def install(self) -> None:
        """From now on calls of CUDA go to the device."""
        from megatron.core.tensor_parallel import random as megatron_random

        for name, answer in (self._torch_cuda() | dict(self._answers)).items():
            self._replace(torch.cuda, name, answer)
        self._replace(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
        self._replace(megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state))
        self.__enter__()

    def remove(self) -> None:
        """Put back what was there before."""
        self.__exit__(None, None, None)
        for owner, name, before in reversed(self._replaced):
            setattr(owner, name, before)
        self._replaced.clear()

    def _replace(self, owner: Any, name: str, answer: object) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, answer)

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": self._device}
        if func is torch.Tensor.cuda:
            return args[0].to(self._device)
        if func is torch.Tensor.pin_memory:
            return self._pin(args[0])
        if func is torch.Tensor.to:
            args = tuple(self._device if _is_cuda(a) else a for a in args)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name: str = func(*args)
            begin = next((begin for begin in self._type_names if name.startswith(begin)), None)
            return name if begin is None else self._type_names[begin] + name.removeprefix(begin)
        return func(*args, **(kwargs or {}))

    def _torch_cuda(self) -> dict[str, object]:
        """Names of torch.cuda and what takes their place. Each is a function of its own: torch.compile tells them
        apart by identity."""

        def stream_class(waits: Callable[[str], None]) -> type:
            class Stream(_Stream):
                def synchronize(self) -> None:
                    waits("Stream.synchronize")

            return Stream

        stream = stream_class(self._waits)
        return {
            "current_device": lambda: self._device,
            "synchronize": lambda device=None: self._waits("torch.cuda.synchronize"),
            "set_device": lambda device: None,
            "empty_cache": lambda: None,
            "Stream": stream,  # a class: libraries name it in annotations
            "current_stream": lambda *args, **kwargs: stream(),
            "default_stream": lambda *args, **kwargs: stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "manual_seed": lambda seed: None,  # the CPU generator is seeded by its own call
            "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
            "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
            "memory_allocated": lambda *args, **kwargs: 0,
            "max_memory_allocated": lambda *args, **kwargs: 0,
        }


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """Stands in for a CUDA stream: everything is in order already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...
