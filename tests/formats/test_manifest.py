"""The manifest of a checkpoint notices whatever happens to its files, and to itself."""

from __future__ import annotations

import hashlib
import os

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.manifest import (
    MANIFEST,
    find_wrong_content,
    find_wrong_size,
    read_manifest,
    record_of,
    seal,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "c").write_bytes(b"x")
    seal(tmp_path, {"a": record_of(tmp_path / "a")})
    return tmp_path


def damage_of(folder):
    manifest = read_manifest(folder)
    return find_wrong_size(folder, manifest) or find_wrong_content(folder, manifest, manifest.files)


def test_it_lists_every_file_but_itself(folder):
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == ["a", "b", "c"]
    for name, record in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert damage_of(folder) is None


@pytest.mark.parametrize("place", [0, 1000, 2303])
def test_every_bit_counts(folder, place):
    content = bytearray((folder / "a").read_bytes())
    content[place] ^= 16
    (folder / "a").write_bytes(content)
    assert damage_of(folder).startswith(f"{folder}/a: damaged")


def test_other_sizes_are_told_without_reading(folder):
    manifest = read_manifest(folder)
    (folder / "c").write_bytes(b"xy")
    assert find_wrong_size(folder, manifest).startswith(f"{folder}/c: has 2 bytes instead of 1")
    (folder / "c").unlink()
    assert find_wrong_size(folder, manifest).startswith(f"{folder}/c: missing")
    os.mkfifo(folder / "c")  # reading it would wait for ever
    assert find_wrong_size(folder, manifest).startswith(f"{folder}/c: is no regular file")


def test_every_byte_of_the_manifest_counts(folder):
    content = (folder / MANIFEST).read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / MANIFEST).write_bytes(changed)
        try:
            damage = damage_of(folder)
        except UserError as error:
            damage = str(error)
        assert damage is not None and str(folder) in damage and "\n" not in damage, (place, damage)


def test_no_manifest_and_a_fifo_in_its_place(folder):
    (folder / MANIFEST).unlink()
    assert read_manifest(folder) is None
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(UserError, match="is no regular file"):
        read_manifest(folder)
