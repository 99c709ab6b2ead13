"""A GPU that is simulated: tensors with shapes and without memory, and a host that is real.

Tensors on the host are torch's own, so whatever is computed there is. Tensors on the GPU are torch's fake tensors on
its `meta` device, inside this process alone. What is copied to the host becomes a real tensor of made-up values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from megatron_ssft.parallel.simulated.counters import Counters
from megatron_ssft.parallel.simulated.sites import here
from megatron_ssft.parallel.simulated.torch_parts import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    FakeWork,
    WeakIdKeyDictionary,
    choose_kernel,
    may_stand_for_a_gpu,
    tree_leaves,
)

GPU = torch.device("meta")
"""What stands for the GPU."""
Kind = Literal["gpu", "cpu"]
"""Whose kernels are simulated: a GPU's, or those that torch takes on the CPU, for comparison with a real run there."""
ANSWER = 4.0
"""What the host reads where it reads what the GPU computed: finite, and as a negative log-likelihood in nats it leaves
six tags a probability below 1 together. A truth value reads as true, a whole number as 1. Tensors of more than
`_LOOKED_AT` numbers, which are for the disk, read as zeros: the host gives zeros no memory before they are changed."""
_LOOKED_AT = 1 << 22
_KNOWN_AT_MOST = 1 << 16
"""Elements of an integer tensor whose values are remembered when it is copied to the GPU."""
aten = torch.ops.aten
_attend = F.scaled_dot_product_attention


class FaultOnGpu(Exception):
    """What a GPU would refuse, or silently wait for; begins with `file:line`."""


class MixedDevices(FaultOnGpu):
    """An operator was given tensors of the GPU and of the host."""


class ValuesNeeded(FaultOnGpu):
    """The size of an operator's result depends on values, for which the host has to wait."""


class _FakeMode(FakeTensorMode):
    """Never asks whether this machine has a GPU."""

    @property
    def avoid_device_init(self) -> bool:
        return True


class SimulatedGpu(Counters):
    """One GPU. Counts in its `with` block, in which models are built and trained on it."""

    def __init__(self, kind: Kind = "gpu", nodes_of: int = 8) -> None:
        super().__init__(nodes_of)
        self.kind = kind
        with may_stand_for_a_gpu(fake_tensor_allow_meta=True):
            self._fake = _FakeMode(allow_non_fake_inputs=True)
        self._values = WeakIdKeyDictionary()
        self._pinned = WeakIdKeyDictionary()
        """Storages of the host in page-locked memory."""

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.prim.device.default:  # most of the calls: `tensor.device`
            return GPU
        return super().__torch_dispatch__(func, types, args, kwargs)

    # -- operators ---------------------------------------------------------------------------------------------------

    def execute(self, func: Any, args: tuple, kwargs: dict) -> object:
        """Run an operator: on the host, from one to the other, or on the GPU."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        device = kwargs.get("device")
        if not on_gpu and (device is None or torch.device(device).type != GPU.type):
            return func(*args, **kwargs)
        copied = self._copied(func, args, kwargs)
        if copied is not None:
            return copied
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return _made_up(args[0].dtype)
        stray = next((t for t in tensors if not isinstance(t, FakeTensor) and t.dim() > 0), None)
        if stray is not None:
            shape = tuple(stray.shape)
            raise MixedDevices(f"{here()}: {func} takes a tensor {shape} of the host beside tensors of the GPU")
        return self._on_gpu(func, args, kwargs)

    def _on_gpu(self, func: Any, args: tuple, kwargs: dict) -> object:
        if func is aten.mm.dtype:
            return self._wide_product(*args)
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except DynamicOutputShapeException as error:
            raise ValuesNeeded(f"{here()}: the size of what {func} gives depends on values on the GPU") from error
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self.memory.add(leaf)
        return out

    def _wide_product(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> object:
        """A product whose sums stay in float32, which CPUs cannot hand out."""
        if self.kind == "cpu":
            raise NotImplementedError("mm with a type of its own for the result is for CUDA")
        shape = [left.size(0), right.size(1)]
        return self._on_gpu(aten.empty.memory_format, (shape,), {"dtype": dtype, "device": GPU})

    def _copied(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """The result of a copy between host and GPU; None if the call is no such copy."""
        if func is aten._to_copy.default:
            source, target = args[0], kwargs.get("device")
            to_gpu = target is not None and torch.device(target).type == GPU.type
            if isinstance(source, FakeTensor):
                to_host = target is not None and not to_gpu
                return self._to_host(source, kwargs.get("dtype")) if to_host else None
            return self._to_gpu(source, kwargs) if to_gpu else None
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            if isinstance(source, FakeTensor) and not isinstance(target, FakeTensor):
                target.copy_(self._to_host(source, target.dtype))
                return target
            if isinstance(target, FakeTensor) and not isinstance(source, FakeTensor) and source.dim() > 0:
                self._gathered(target)
                self._count(source, bool(args[2]) if len(args) > 2 else False)
                return target
        return None

    def _to_host(self, source: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A real tensor of made-up values, or of the right ones where they are known."""
        self._gathered(source)
        values = self._values.get(source)
        if values is None:
            copy = _made_up_tensor(source.shape, source.dtype, dtype or source.dtype)
        else:
            copy = values.to(dtype or source.dtype, copy=True)
        self.count_copy_to_host(copy)
        return copy

    def _gathered(self, tensor: Tensor) -> None:
        """CUDA copies what lies scattered by way of a further tensor on the GPU, for a moment."""
        if not _is_dense(tensor):
            with self._fake:
                self.memory.add(torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU))

    def _to_gpu(self, source: Tensor, kwargs: dict) -> Tensor:
        self._count(source, bool(kwargs.get("non_blocking")))
        dtype = kwargs.get("dtype") or source.dtype
        with self._fake:
            copy = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=GPU)
        self.memory.add(copy, "weights" if self.memory.usual_part == "weights" else "other")
        if not dtype.is_floating_point and source.numel() <= _KNOWN_AT_MOST:
            self._values[copy] = source.detach().clone()
        return copy

    def pin(self, tensor: Tensor) -> Tensor:
        """Tensor.pin_memory: the copy of a host's tensor that the GPU can fetch by itself."""
        if tensor.untyped_storage() in self._pinned:
            return tensor
        copy = tensor.clone()
        self._pinned[copy.untyped_storage()] = True
        return copy

    def _count(self, source: Tensor, non_blocking: bool) -> None:
        """Count a copy to the GPU. The host waits for one from memory that is not page-locked, whatever was asked."""
        self.count_copy(source.nbytes, non_blocking and source.untyped_storage() in self._pinned)

    # -- other ranks -------------------------------------------------------------------------------------------------

    def communicate(self, func: Any, args: tuple, kwargs: dict) -> object:
        """Say that it is done. Gathered and received values are as made up as all others."""
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            return func(*args, **kwargs)  # between hosts: the process group answers
        self.count_message(func, args)
        done = FakeWork().boxed()
        results = [argument.type for argument in func._schema.returns]
        if len(results) == 1:
            return done
        return args[0], done

    def values_of(self, numbers: Tensor) -> list[int] | None:
        values = self._values.get(numbers)
        return None if values is None else values.tolist()

    # -- what torch.cuda says of it --------------------------------------------------------------------------------

    def answers(self) -> dict[str, object]:
        """Names of torch.cuda and what takes their place. Peaks are those of the section."""
        gpu = self

        class Event:
            def __init__(self, **kwargs: object) -> None: ...

            def record(self, stream: object = None) -> None: ...

            def wait(self, stream: object = None) -> None: ...

            def synchronize(self) -> None:
                gpu.wait("Event.synchronize")

            def elapsed_time(self, end: object) -> float:
                return 0.0

        return {
            "Event": Event,
            "memory_allocated": lambda device=None: gpu.memory.alive,
            "max_memory_allocated": lambda device=None: gpu.memory.peak,
            "max_memory_reserved": lambda device=None: gpu.memory.peak,
            "reset_peak_memory_stats": lambda device=None: None,
        }

    # -- functions that choose a kernel by the device ------------------------------------------------------------------

    def replacements(self) -> list[tuple[Any, str, object]]:
        """(owner, name, what takes its place) of functions of torch that act by the device."""
        replacements: list[tuple[Any, str, object]] = [
            (F, "scaled_dot_product_attention", self.attend),
            (torch, "tensor", _then_copied(torch.tensor)),
            (nn.Module, "_apply", apply_in_place),
        ]
        if self.kind == "cpu":
            replacements.append((torch.Tensor, "is_cpu", property(lambda tensor: True)))
        else:
            replacements += [(fused_bias_swiglu, name, kernel) for name, kernel in _FUSED_SWIGLU.items()]
        return replacements

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """F.scaled_dot_product_attention: with the kernel that the simulated device would take."""
        if not isinstance(query, FakeTensor):
            return _attend(query, key, value, *args, **kwargs)
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args)) | kwargs
        mask, is_causal, scale = given.get("attn_mask"), bool(given.get("is_causal")), given.get("scale")
        kernel = self._kernel_on_cpu(query, key, value, given) if self.kind == "cpu" else _kernel_on_gpu(query, mask)
        if kernel == SDPBackend.MATH:
            return _attend(query, key, value, **given)
        call: Callable[..., Any] = {
            (SDPBackend.FLASH_ATTENTION, "cpu"): aten._scaled_dot_product_flash_attention_for_cpu,
            (SDPBackend.FLASH_ATTENTION, "gpu"): aten._scaled_dot_product_flash_attention,
            (SDPBackend.EFFICIENT_ATTENTION, "gpu"): aten._scaled_dot_product_efficient_attention,
        }[kernel, self.kind]
        if kernel == SDPBackend.EFFICIENT_ATTENTION:
            needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            result = call(query, key, value, mask, needs_gradient, 0.0, is_causal, scale=scale)
        elif self.kind == "cpu":
            result = call(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        else:
            result = call(query, key, value, 0.0, is_causal, scale=scale)
        return result[0]

    def _kernel_on_cpu(self, query: Tensor, key: Tensor, value: Tensor, given: dict) -> SDPBackend:
        """Torch decides by shapes alone, so it is asked about tensors whose memory is never touched."""

        def real(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            shape, stride = tensor.shape, tensor.stride()
            return torch.empty_strided(shape, stride, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)

        like: list[Any] = [real(tensor) for tensor in (query, key, value)]
        number = choose_kernel(
            like[0],
            like[1],
            like[2],
            attn_mask=real(given.get("attn_mask")),
            is_causal=bool(given.get("is_causal")),
            scale=given.get("scale"),
            enable_gqa=bool(given.get("enable_gqa")),
        )
        return SDPBackend(number)


def _kernel_on_gpu(query: Tensor, mask: Tensor | None) -> SDPBackend:
    """Flash attention takes no masks and no float32."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return SDPBackend.FLASH_ATTENTION if mask is None and is_half else SDPBackend.EFFICIENT_ATTENTION


def _swiglu(gate_and_up: Tensor, *_: Tensor) -> Tensor:
    return gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.size(-1) // 2)


def _swiglu_back(grad: Tensor, gate_and_up: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(gate_and_up)


_FUSED_SWIGLU: dict[str, Callable[..., Tensor]] = {
    "swiglu": _swiglu,
    "bias_swiglu": _swiglu,
    "swiglu_back": _swiglu_back,
    "bias_swiglu_back": _swiglu_back,
}
"""megatron-core's functions that torch compiles: each is one kernel, which makes its result and nothing beside it."""


def _then_copied(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor of Python's numbers: on the host first, as torch does it unseen."""

    def made(*args: Any, device: object = None, **kwargs: Any) -> Tensor:
        on_gpu = device is not None and torch.device(device).type in (GPU.type, "cuda")  # type: ignore[call-overload]
        tensor = make(*args, **kwargs)
        return tensor.to(GPU) if on_gpu else tensor

    return made


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie in one piece, in whatever order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _made_up_tensor(shape: torch.Size, computed: torch.dtype, dtype: torch.dtype) -> Tensor:
    """What the host finds in a tensor of the GPU of type `computed`, read as type `dtype`."""
    if shape.numel() <= _LOOKED_AT:
        return torch.full(shape, _made_up(computed), dtype=dtype)
    return torch.from_numpy(np.zeros(shape.numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _made_up(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return ANSWER if dtype.is_floating_point else 1


def apply_in_place(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply for simulated parameters, which torch cannot exchange; those that do not change stay."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = fn(parameter)
        if changed is parameter or (changed.dtype, changed.device) == (parameter.dtype, parameter.device):
            continue
        renewed = nn.Parameter(changed, parameter.requires_grad)
        marks = {key: mark for key, mark in vars(parameter).items() if key not in vars(changed)}
        vars(renewed).update(marks)
        module._parameters[name] = renewed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
