"""manifest.json: size and sha256 of every file of a checkpoint, so that no damage to it passes in silence.

It is written last, when everything else is on the disk. The text has one spelling only: where a byte of it changed, it
is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import sync_folder, sync_path, write_durably
from megatron_ssft.formats.run_folder import REMOVE_ADVICE

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
"""The version that this code writes and reads."""
HASHING_THREADS = 2


class FileRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file must be."""

    size: Annotated[int, Meta(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every file of a checkpoint by its name in the folder; an export (hf) has proofs of its own."""

    format: int
    files: dict[str, FileRecord]


def record_of(path: Path) -> FileRecord:
    """The record of a file as it stands there. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


def seal(folder: Path, written: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a folder, whose files are all there, and bring all of it onto the disk. Raises OSError.

    Args:
        written: records of files that are on the disk already; the others are brought there, and hashed.
    """
    records = dict(written)
    for path in folder.iterdir():
        if path.name not in records:
            sync_path(path)
            records[path.name] = record_of(path)
    write_durably(folder / MANIFEST, _encode(Manifest(format=MANIFEST_FORMAT, files=records)))
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none. Raises UserError for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        if path.exists():
            raise UserError(f"{path}: is no regular file; {REMOVE_ADVICE}")
        return None
    try:
        content = path.read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {REMOVE_ADVICE}") from error
    if manifest.format != MANIFEST_FORMAT:
        raise UserError(f"{path}: format {manifest.format}, this version reads {MANIFEST_FORMAT}")
    if content != _encode(manifest).encode():
        raise UserError(f"{path}: damaged (it is not as it was written); {REMOVE_ADVICE}")
    return manifest


def find_wrong_size(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the first file that is missing or has another size; reads none of them."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: {'is no regular file' if path.exists() else 'missing'}; {REMOVE_ADVICE}"
        size = path.stat().st_size
        if size != record.size:
            return f"{path}: has {size} bytes instead of {record.size}; {REMOVE_ADVICE}"
    return None


def find_wrong_content(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with the first of these files that does not hold what was written."""

    def check(name: str) -> str | None:
        try:
            record = record_of(folder / name)
        except OSError as error:
            return f"{folder / name}: cannot be read ({error.strerror}); {REMOVE_ADVICE}"
        if record == manifest.files[name]:
            return None
        return f"{folder / name}: damaged: its sha256 is not the one it was written with; {REMOVE_ADVICE}"

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return next((damage for damage in pool.map(check, names) if damage is not None), None)


def _encode(manifest: Manifest) -> str:
    """The one spelling: names in order."""
    files = {name: msgspec.to_builtins(record) for name, record in sorted(manifest.files.items())}
    return json.dumps({"format": manifest.format, "files": files}, indent=1) + "\n"
