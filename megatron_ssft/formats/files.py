"""Writing that a crash leaves whole: the old files or the new ones, never a part.

A file gets its name when its bytes are on the disk (`write_durably`, `whole_file`); a folder when all its files are
(`new_folder`, or `publish_folder` where several processes wrote into it).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_PARTS = ("*.tmp", ".*.tmp", ".*.partial", ".*.old")
"""Names that nothing has but what is not complete yet, or not any more."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError inside the block say which file it is of: that of a write does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_durably(path: Path, text: str) -> None:
    """Write a whole text file in place of the old one. Raises OSError, and leaves nothing then."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            sync_file(file)
        publish_file(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file that gets its name where the block ends well; else nothing is left. Raises OSError.

    The temporary name is one of its own, so that two programs may write at the same time; the later one counts.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            sync_file(file)
        temporary.chmod(0o644)  # mkstemp keeps others out
        publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a kill kept from getting its name in a folder: files and folders. Raises OSError.

    A folder that made way for another (`.NAME.old`), which then did not get the name, comes back. Nobody may be writing
    in the folder meanwhile.
    """
    for old in folder.glob(".*.old"):
        place = folder / old.name.removeprefix(".").removesuffix(".old")
        if not place.exists():
            os.rename(old, place)
    for pattern in _PARTS:
        for part in folder.glob(pattern):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink()


def publish_file(partial: Path, path: Path) -> None:
    """Give a file on the disk its name, in place of an older one; both in one file system. Raises OSError."""
    os.replace(partial, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of `path` where the block ends well; else `path` stays. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as parent:
        fresh = Path(parent) / path.name
        fresh.mkdir()
        yield fresh
        sync_tree(fresh)
        publish_folder(fresh, path)


def publish_new_folder(partial: Path, path: Path) -> None:
    """Give a complete folder a name that no other has. Raises OSError where one has, unless that is empty."""
    sync_tree(partial)
    os.rename(partial, path)
    sync_folder(path.parent)


def publish_folder(partial: Path, path: Path) -> None:
    """Give a complete folder, whose files are on the disk, its name. Raises OSError.

    A folder that has the name already makes way: it becomes `.NAME.old` for the moment between two renames, since no
    file system replaces a full folder at once, and is then deleted.
    """
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(partial, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(file: IO[Any]) -> None:
    """Bring what was written to an open file onto the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk. Raises OSError."""
    sync_path(folder)


def sync_tree(folder: Path) -> None:
    """Bring a folder with all that is in it onto the disk. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk, whoever wrote it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
