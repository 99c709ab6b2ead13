"""Conversions from and to Hugging Face folders, as bodies for `run_ranks`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from megatron_ssft.errors import UserError
from megatron_ssft.training import conversion


def weights_of(folder):
    """All tensors of a folder by name."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def import_hf(source, target, options):
    conversion.import_hf(Path(source), Path(target), dict(options))


def export_run(source, target, options):
    conversion.export_run(Path(source), Path(target), dict(options))


def verify(source, target, options):
    """The refusal, or None."""
    try:
        conversion.verify(Path(source), Path(target), dict(options))
    except UserError as error:
        return str(error)
    return None
