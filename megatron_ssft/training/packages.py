"""Packages that the flags ask for: what is missing is said before anything is tokenized."""

from __future__ import annotations

import importlib.util

import torch

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention.choice import missing_module
from megatron_ssft.parallel.attention.kernels import VARLEN_KERNELS
from megatron_ssft.parallel.device_defaults import refuse_fusions
from megatron_ssft.training.trackers import missing_trackers

_KERNELS = {name: kernel.module for name, kernel in VARLEN_KERNELS.items() if name != "varlen"}
"""--attention-backend -> the package it comes with."""


def missing_packages(config: RunConfig) -> list[str]:
    """One refusal per flag that needs a package which is not installed."""
    missing = []
    if config.model.transformer_impl == "transformer_engine" and not _is_installed("transformer_engine"):
        missing.append(
            "--transformer-impl transformer_engine: TransformerEngine is not installed; install the [te] extra or use "
            "--transformer-impl local"
        )
    backend = config.parallel.attention_backend
    problem = missing_module(_KERNELS[backend]) if backend in _KERNELS else None
    if problem is not None:
        missing.append(f"--attention-backend {backend}: {problem}; install it or choose another")
    return missing + missing_trackers(config.logging, config.checkpoint.save)


def refuse_missing(config: RunConfig, device: torch.device) -> None:
    """Raise UserError where a flag asks for what is not installed, or cannot be on this device."""
    if config.model.transformer_impl == "transformer_engine" and device.type != "cuda":
        raise UserError("--transformer-impl transformer_engine needs CUDA; use --transformer-impl local")
    refuse_fusions(config, device)
    for text in missing_packages(config):
        raise UserError(text)


def kernels_remark(config: RunConfig, device: torch.device) -> str | None:
    """A line on fast attention kernels that a GPU could use and that are not installed; None: nothing is missing."""
    packed = config.training.sequence_layout != "padded"
    if device.type != "cuda" or not packed or config.parallel.attention_backend != "auto":
        return None
    if not config.parallel.bf16 or not all(map(missing_module, _KERNELS.values())):
        return None
    return (
        f"none of {', '.join(_KERNELS.values())} is installed: attention of token streams goes through torch's own "
        "kernels, which may be slower"
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
