"""Packages that the flags ask for: what is missing is said before anything is tokenized."""

from __future__ import annotations

import importlib.util

import torch

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.training.trackers import missing_trackers

_KERNELS = {"flash": "flash_attn", "te": "transformer_engine"}
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
    if backend in _KERNELS and not _is_installed(_KERNELS[backend]):
        missing.append(
            f"--attention-backend {backend}: {_KERNELS[backend]} is not installed; install it or choose another"
        )
    return missing + missing_trackers(config.logging, config.checkpoint.save)


def refuse_missing(config: RunConfig, device: torch.device) -> None:
    """Raise UserError where a flag asks for what is not installed, or cannot be on this device."""
    if config.model.transformer_impl == "transformer_engine" and device.type != "cuda":
        raise UserError("--transformer-impl transformer_engine needs CUDA; use --transformer-impl local")
    for text in missing_packages(config):
        raise UserError(text)


def kernels_remark(config: RunConfig, device: torch.device) -> str | None:
    """A line on fast attention kernels that a GPU could use and that are not installed; None: nothing is missing."""
    packed = config.training.sequence_layout != "padded"
    if device.type != "cuda" or not packed or config.parallel.attention_backend != "auto":
        return None
    if not config.parallel.bf16 or any(map(_is_installed, _KERNELS.values())):
        return None
    return (
        f"neither {' nor '.join(_KERNELS.values())} is installed: attention of token streams goes through torch's own "
        "kernels, which may be slower"
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
