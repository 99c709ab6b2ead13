"""What path flags may name: regular files and folders. A pipe would be waited on, a device read for ever."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from megatron_ssft.config.fields import FlagField
from megatron_ssft.errors import UserError

_OF_MODEL = ("config.json", "config.yaml", "tokenizer.json", "latest_checkpointed_iteration.txt")
"""A folder with one of them is a model or a run, and is looked into."""
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def refuse_special_files(fields: Iterable[FlagField], values: object) -> None:
    """Raise UserError for a path among the values that names neither a regular file nor a folder.

    Args:
        values: has an attribute for each field.
    """
    for field in fields:
        value = getattr(values, field.name, None)
        if value is None or not (field.flag.path or field.kind is Path):
            continue
        flag = f"{field.name}" if field.flag.positional else f"--{field.name.replace('_', '-')}"
        for path in value if isinstance(value, list | tuple) else [value]:
            refuse_special_file(flag, Path(path))


def refuse_special_file(flag: str, path: Path) -> None:
    """Raise UserError where `path`, given by `flag`, or an entry of a model's or run's folder is a pipe or device."""
    kind = _special_kind(path)
    if kind is not None:
        raise UserError(f"{flag} {path}: is {kind}; give a regular file, or a folder where one is meant")
    if not path.is_dir():
        return
    for folder in (path, path / "hf"):  # a run keeps the files for its exports there
        names = _names(folder)
        if not any(name in names for name in _OF_MODEL):
            continue
        for name in names:
            kind = _special_kind(folder / name)
            if kind is not None:
                raise UserError(f"{folder / name}: is {kind}; put a regular file there, or remove it")


def _names(folder: Path) -> list[str]:
    """Sorted names of a folder's entries; none where it cannot be read, which whoever needs it says."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _special_kind(path: Path) -> str | None:
    """What a path is that is neither file nor folder; None: it is one, or is not there. Links are followed."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return _KINDS.get(stat.S_IFMT(mode))
