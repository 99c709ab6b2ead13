"""The choice of the attention kernel that token streams go through, for --attention-backend.

The kernels themselves are in kernels.py.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention.kernels import VARLEN_KERNELS, SdpaAttend, StreamParams, VarlenAttend
from megatron_ssft.parallel.device import is_gpu
from megatron_ssft.records import Segment

_AMPERE = ("flash", "varlen", "te")
_HOPPER = ("flash3", "te", "flash4", "flash", "varlen")
_BLACKWELL = ("flash4", "te", "flash", "varlen")
_OTHERS = ("te", "flash", "varlen")
_ORDER = {8: _AMPERE, 9: _HOPPER, 10: _BLACKWELL, 11: _BLACKWELL}
"""Major number of the compute capability -> kernels, the fastest first. FlashAttention 2 has nothing made for Hopper
and later GPUs. FlashAttention 3 is made for Hopper, 4 for data-centre Blackwell and, less tuned, for Hopper.
TransformerEngine takes cuDNN's kernels from Hopper on, in preference to FlashAttention 2, and the latter before."""
_TRIALS = 3
"""Gradients that have to agree to the bit under --deterministic-mode."""


@dataclass(frozen=True)
class AttentionBackend:
    """The kernel that streams go through."""

    name: str
    width: int
    """Channels of all query heads on this rank."""
    dtype: torch.dtype
    device: torch.device
    why: str
    """For the log: why this one."""
    deterministic: bool = False
    """Gradients are the same to the bit when they are computed again."""

    def stream(self, segments: tuple[Segment, ...], length: int) -> StreamParams:
        """Prepare one token stream of `length` tokens; built once, used by every layer."""
        if self.name == "sdpa":
            return StreamParams(attend=SdpaAttend(segments, length, self.width, self.dtype, self.device))
        kernel = VARLEN_KERNELS[self.name].call
        return StreamParams(attend=VarlenAttend(segments, length, self.device, kernel, self.deterministic))


def choose_backend(
    requested: str,
    num_heads: int,
    num_groups: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
) -> AttentionBackend:
    """Choose the requested kernel, or with `auto` the fastest that is there and agrees with SDPA on a small stream.

    The check makes sure of what documentation leaves open, such as how a causal mask is aligned where there are more
    keys than queries.

    Args:
        deterministic: only a kernel whose gradients are the same to the bit each time.

    Raises:
        UserError: the kernel asked for is not there, is wrong, or is not deterministic.
    """
    reasons: list[str] = []
    candidates = candidates_for(requested, dtype, device)
    for place, name in enumerate(candidates):
        problem = _unusable(name, dtype, device)
        why = "; ".join([_what_for(requested, dtype, device), *reasons, *_not_tried(candidates[place + 1 :])])
        backend = AttentionBackend(name, num_heads * channels, dtype, device, why, deterministic)
        if problem is None and name != "sdpa":
            problem = _disagreement(backend, num_heads, num_groups, channels)
        if problem is None:
            return backend
        reasons.append(f"{name}: {problem}")
    raise UserError(f"--attention-backend {requested}: {reasons[0].partition(': ')[2]}; choose another or auto")


def candidates_for(requested: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Kernels in the order in which they are tried."""
    if requested != "auto":
        return [requested]
    if _needs(dtype, device) is not None:
        return ["sdpa"]
    return [*_ORDER.get(_major(device), _OTHERS), "sdpa"]


def _what_for(requested: str, dtype: torch.dtype, device: torch.device) -> str:
    """By what the order of the kernels is decided."""
    if requested != "auto":
        return "as asked"
    needs = _needs(dtype, device)
    return f"every other kernel {needs}" if needs else f"for capability {'.'.join(map(str, _capability(device)))}"


def _not_tried(names: list[str]) -> list[str]:
    return [f"not tried: {', '.join(names)}"] if names else []


def _needs(dtype: torch.dtype, device: torch.device) -> str | None:
    """What all kernels but SDPA lack."""
    if not is_gpu(device):
        return "needs CUDA"
    return "needs --bf16" if dtype not in (torch.bfloat16, torch.float16) else None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(None if device.type == "meta" else device)  # a simulated GPU has its own


def _major(device: torch.device) -> int:
    return _capability(device)[0]


def _unusable(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a kernel cannot be used with this precision on this device; None if it can."""
    if name == "sdpa":
        return None
    needs = _needs(dtype, device)
    if needs is not None:
        return needs
    kernel = VARLEN_KERNELS[name]
    if kernel.majors and _major(device) not in kernel.majors:
        made_for = " or ".join(f"{major}.x" for major in kernel.majors)
        return f"is made for compute capability {made_for}, this GPU has {'.'.join(map(str, _capability(device)))}"
    return missing_module(kernel.module)


def missing_module(module: str) -> str | None:
    """What is wrong with a kernel's module as far as can be said without using it; None if nothing."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return f"{module} is not installed"
    if top == module or module.startswith("transformer_engine"):
        return None
    try:
        spec = importlib.util.find_spec(module)  # imports the package above it
    except (ImportError, OSError) as error:
        return f"{top} cannot be imported ({_first_line(error)})"
    if spec is not None:
        return None
    return f"this torch has no {module}" if top == "torch" else f"{module} is not installed"


_CHECKED = (
    Segment(0, 70, ()),
    Segment(70, 40, ((0, 70),)),
    Segment(110, 90, ((0, 70), (70, 40))),
    Segment(200, 33, ()),
)


def _disagreement(backend: AttentionBackend, num_heads: int, num_groups: int, channels: int) -> str | None:
    """Say how the kernel differs from SDPA in output or gradient on a small stream; None if it does not."""
    length = sum(s.length for s in _CHECKED)
    generator = torch.Generator().manual_seed(0)  # the CPU's, so that nothing else that is random changes
    shapes = [(length, heads, channels) for heads in (num_heads, num_groups, num_groups)]
    draws = [torch.randn(shape, generator=generator).to(backend.device, backend.dtype) for shape in shapes]
    sdpa = AttentionBackend("sdpa", backend.width, backend.dtype, backend.device, "")

    def results_of(kind: AttentionBackend) -> list[Tensor]:
        query, key, value = (x.clone().requires_grad_() for x in draws)
        out = kind.stream(_CHECKED, length).attend(query, key, value, None)
        return [out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))]

    expected = results_of(sdpa)
    try:
        computed = results_of(backend)
        again = [results_of(backend) for _ in range(_TRIALS - 1)] if backend.deterministic else []
    except _failures() as error:
        return f"does not run here ({_first_line(error)})"
    for a, b in zip(expected, computed):
        distance = (a.float() - b.float()).norm() / a.float().norm()
        if not distance < 2e-2:  # bfloat16 has 8 bits
            return f"differs from SDPA by {distance:.3g}"
    if not all(bool((a == b).all()) for results in again for a, b in zip(computed, results)):
        return "gives other gradients when it is run again, against --deterministic-mode"
    return None


def _failures() -> tuple[type[Exception], ...]:
    """Errors by which kernels say that they do not run."""
    ours = (RuntimeError, ImportError, OSError, NotImplementedError, AttributeError, LookupError)
    compiler = getattr(sys.modules.get("cutlass.base_dsl.common"), "DSLBaseError", None)  # of FlashAttention 4
    return (*ours, TypeError, ValueError, AssertionError, *([compiler] if compiler else []))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
