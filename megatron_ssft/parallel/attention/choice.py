"""The choice of the attention kernel that token streams go through, for --attention-backend.

The kernels themselves are in kernels.py.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention.kernels import VARLEN_KERNELS, SdpaAttend, StreamParams, VarlenAttend
from megatron_ssft.records import Segment


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

    def stream(self, segments: tuple[Segment, ...], length: int) -> StreamParams:
        """Prepare one token stream of `length` tokens; built once, used by every layer."""
        if self.name == "sdpa":
            return StreamParams(attend=SdpaAttend(segments, length, self.width, self.dtype, self.device))
        return StreamParams(attend=VarlenAttend(segments, length, self.device, VARLEN_KERNELS[self.name][1]))


def choose_backend(
    requested: str, num_heads: int, num_groups: int, channels: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """Choose the requested kernel, or with `auto` the first that is there and agrees with SDPA on a small stream.

    The check makes sure of what documentation leaves open, such as how a causal mask is aligned where there are more
    keys than queries.

    Raises:
        UserError: the kernel asked for is not there or is wrong.
    """
    candidates = ["sdpa"] if requested == "sdpa" else [*VARLEN_KERNELS, "sdpa"] if requested == "auto" else [requested]
    reasons: list[str] = []
    for name in candidates:
        problem = _unusable(name, dtype, device)
        backend = AttentionBackend(name, num_heads * channels, dtype, device, "; ".join(reasons) or "first choice")
        if problem is None and name != "sdpa":
            problem = _disagreement(backend, num_heads, num_groups, channels)
        if problem is None:
            return backend
        reasons.append(f"{name}: {problem}")
    raise UserError(f"--attention-backend {requested}: {reasons[0].partition(': ')[2]}; choose another or auto")


def _unusable(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a kernel cannot be used with this precision on this device; None if it can."""
    if name == "sdpa":
        return None
    if device.type == "cpu":
        return "needs CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs --bf16"
    module = VARLEN_KERNELS[name][0]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module} is not installed"
    if module.startswith("torch.") and importlib.util.find_spec(module) is None:
        return f"this torch has no {module}"
    return None


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
    results: list[list[Tensor]] = []
    try:
        for kind in (sdpa, backend):
            query, key, value = (x.clone().requires_grad_() for x in draws)
            out = kind.stream(_CHECKED, length).attend(query, key, value, None)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
    except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"does not run here ({reason})"
    for expected, computed in zip(*results):
        distance = (expected.float() - computed.float()).norm() / expected.float().norm()
        if not distance < 2e-2:  # bfloat16 has 8 bits
            return f"differs from SDPA by {distance:.3g}"
    return None
