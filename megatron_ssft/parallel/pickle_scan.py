"""Refuses checkpoints whose metadata pickle would import anything but the classes such metadata is made of.

megatron-core opens `.metadata` with a plain `pickle.load`, so a checkpoint from elsewhere could run code. It is read
here first by an unpickler that knows only the classes below. (`common.pt` goes through torch.load, which has a
safe unpickler of its own.)
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import torch

from megatron_ssft.errors import UserError

_ALLOWED = {
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
}


class _ForeignGlobal(Exception):
    """A name outside the list; its text says which."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _ForeignGlobal(f"{module}.{name}")


def refuse_foreign_pickles(folder: Path) -> None:
    """Raise UserError if the metadata of a checkpoint folder is damaged or names a class it does not need."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            _MetadataUnpickler(file).load()
    except _ForeignGlobal as error:
        raise UserError(f"{path}: refused: it would import {error}, which no checkpoint needs") from error
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: damaged or missing ({error}); remove this checkpoint to load an older one") from error
