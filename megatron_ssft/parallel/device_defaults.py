"""Settings that are left to the device: what they are on this one, and what they would be on another."""

from __future__ import annotations

import dataclasses
import importlib

import torch

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError

GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
"""apex's extension, without which megatron-core's layers refuse --gradient-accumulation-fusion."""
_LEFT_TO_THE_DEVICE = (
    "overlap_grad_reduce",
    "overlap_param_gather",
    "bias_swiglu_fusion",
    "gradient_accumulation_fusion",
)
_FOR_GPUS_ONLY = _LEFT_TO_THE_DEVICE[2:]


def decided(config: RunConfig, on_gpu: bool) -> RunConfig:
    """The configuration with a value for every setting that is left to the device."""
    parallel = config.parallel.decided(on_gpu, has_gradient_kernel())
    if not config.model.swiglu:
        parallel = dataclasses.replace(parallel, bias_swiglu_fusion=False)
    return dataclasses.replace(config, parallel=parallel)


def has_gradient_kernel() -> bool:
    """Whether apex's kernel that adds to weight gradients is there, and fits the installed torch."""
    try:
        importlib.import_module(GRADIENT_KERNEL)
    except (ImportError, OSError):
        return False
    return True


def refuse_fusions(config: RunConfig, device: torch.device) -> None:
    """Raise UserError for fused kernels that were asked for and are not there."""
    for name in _FOR_GPUS_ONLY:
        if getattr(config.parallel, name) and device.type == "cpu":
            raise UserError(f"--{name.replace('_', '-')} needs CUDA; leave it out, and a GPU has it all the same")
    if config.parallel.gradient_accumulation_fusion and not has_gradient_kernel():
        raise UserError(
            f"--gradient-accumulation-fusion: {GRADIENT_KERNEL} is not installed; build apex with its CUDA extensions, "
            "or leave it out"
        )


def defaults_line(config: RunConfig) -> str:
    """For --dry-run, which need not run where the job does: what is on with a GPU, and what on the CPU."""
    gpu = [_flag(name) for name in _LEFT_TO_THE_DEVICE if getattr(decided(config, True).parallel, name)]
    cpu = [_flag(name) for name in _LEFT_TO_THE_DEVICE if getattr(decided(config, False).parallel, name)]
    if config.parallel.gradient_accumulation_fusion is None and not has_gradient_kernel():
        gpu.append(f"{_flag('gradient_accumulation_fusion')} where apex is")
    return f"left to the device: on GPUs {', '.join(gpu) or 'nothing is on'}; on the CPU {', '.join(cpu) or 'nothing'}"


def device_line(config: RunConfig, device: torch.device) -> str | None:
    """For the log of a run on GPUs: which of these are on and which off; None on the CPU."""
    if device.type == "cpu":
        return None
    parallel = decided(config, True).parallel
    told = [f"{_flag(name)} {'on' if getattr(parallel, name) else 'off'}" for name in _LEFT_TO_THE_DEVICE]
    lacks = config.parallel.gradient_accumulation_fusion is None and not has_gradient_kernel()
    return ", ".join(told) + (f" ({GRADIENT_KERNEL} of apex is not installed)" if lacks else "")


def _flag(name: str) -> str:
    return name.replace("_", "-")
