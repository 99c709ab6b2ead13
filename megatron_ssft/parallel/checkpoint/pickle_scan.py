"""Looks at a checkpoint before megatron-core opens it: whole, and nothing in it that would be executed.

megatron-core opens `.metadata` with a plain `pickle.load`, so a checkpoint from elsewhere could run code. It is read
here first by an unpickler that knows only the classes such metadata is made of. `common.pt` goes through torch.load,
which has a safe unpickler of its own. Everything else must be tensors.
"""

from __future__ import annotations

import enum
import importlib
import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import REMOVE_ADVICE

_ALLOWED = {
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",  # may be named, is refused as an entry
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


_READ = (".metadata", "metadata.json", "common.pt")
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What metadata.json of every checkpoint of ours says; another backend would read the files by other rules.

megatron-core before 0.19 asks for all of it, and later ones for the first two.
"""
# What unpickling damaged bytes was seen to raise, and what pickle's documentation says it may.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _ForeignGlobal(Exception):
    """A name outside the list; its text says which."""


def _enum_member(cls: object, name: str) -> object:
    """The one use of `getattr`: some Python versions pickle an enumeration's member as getattr(cls, name)."""
    if not (isinstance(cls, type) and issubclass(cls, enum.Enum)) or name not in cls.__members__:
        raise _ForeignGlobal("builtins.getattr")
    return cls.__members__[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _ForeignGlobal(f"{module}.{name}")


def refuse_unusable(folder: Path) -> None:
    """Raise UserError, one line, if a checkpoint folder is damaged or would run code when it is read."""
    for name in _READ:
        if (folder / name).exists() and not (folder / name).is_file():  # a pipe would be waited on for ever
            raise UserError(f"{folder / name}: is no regular file; {REMOVE_ADVICE}")
    metadata = refuse_foreign_pickles(folder)
    _refuse_missing_bytes(folder, metadata)
    try:
        backends = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        common = torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
        if backends != BACKENDS:
            raise ValueError(f"metadata.json holds {str(backends)[:80]} and not {BACKENDS}")
        if not isinstance(common, dict):
            raise ValueError("common.pt holds no dictionary")
    except (OSError, *_DAMAGE) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: damaged or foreign: {reason or type(error).__name__}; {REMOVE_ADVICE}") from error


def refuse_foreign_pickles(folder: Path) -> Metadata:
    """The metadata of a checkpoint folder, read safely.

    Entries that are objects instead of tensors are refused as well: torch would unpickle them without a check.

    Raises:
        UserError: the metadata is damaged, or names a class or an object that no checkpoint of ours has.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _ForeignGlobal as error:
        raise UserError(f"{path}: refused: it would import {error}, which no checkpoint needs") from error
    except (OSError, *_DAMAGE) as error:
        raise UserError(f"{path}: damaged or missing ({type(error).__name__}); {REMOVE_ADVICE}") from error
    entries = getattr(metadata, "state_dict_metadata", None)
    if not isinstance(metadata, Metadata) or not isinstance(entries, dict):
        raise UserError(f"{path}: damaged: it holds no metadata; {REMOVE_ADVICE}")
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{path}: refused: {name} is an object, not a tensor, and reading it could run code")
    return metadata


def _refuse_missing_bytes(folder: Path, metadata: Metadata) -> None:
    """Raise UserError if a shard file is absent or shorter than the metadata says, or no file of the folder."""
    needed: dict[str, int] = {}
    try:
        for place in metadata.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        foreign = [name for name in needed if Path(name).name != name]
    except _DAMAGE as error:
        raise UserError(
            f"{folder / '.metadata'}: damaged ({type(error).__name__}: {error}); {REMOVE_ADVICE}"
        ) from error
    if foreign:
        raise UserError(f"{folder / '.metadata'}: refused: it names {foreign[0]}, which is no file beside it")
    for name, size in needed.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise UserError(f"{path}: missing or cut short, {size} bytes are needed; {REMOVE_ADVICE}")
