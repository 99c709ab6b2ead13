"""What every rank of a job has to have alike: configuration, code, versions of libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import megatron_ssft
from megatron_ssft.config import ProgramConfig
from megatron_ssft.config.flags import flat

LIBRARIES = (
    "torch", "megatron-core", "numpy", "lap", "transformers", "tokenizers", "safetensors", "sentencepiece", "msgspec",
    "transformer-engine", "flash-attn", "apex",
)  # fmt: skip
"""Distributions whose version can change what is computed; `absent` where one is not installed."""
VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that change what is computed."""


def facts_of(config: ProgramConfig) -> dict[str, str]:
    """Name -> value of everything that has to be the same on all ranks of a job."""
    settings = {name: value for section in flat(config).values() for name, value in section.items()}
    return {f"--{name.replace('_', '-')}": str(value) for name, value in settings.items()} | installed()


def installed() -> dict[str, str]:
    """The code of the package, file by file, and what it runs on."""
    root = Path(megatron_ssft.__file__).parent
    code = {
        f"megatron_ssft/{path.relative_to(root).as_posix()}": f"sha256 {_digest(path)}" for path in root.rglob("*.py")
    }
    versions = {name: _version(name) for name in LIBRARIES}
    variables = {name: os.environ.get(name, "unset") for name in VARIABLES}
    return code | versions | variables | {"Python": platform.python_version()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
