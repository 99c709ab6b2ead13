"""Safetensors folders read slice by slice; safetensors_writer.py writes them.

The file format: 8 bytes little-endian length of the header, the header (JSON: for each tensor its dtype, shape and
[begin, end) in the data), the data without gaps. The safetensors library checks a file when it is opened; the bytes
are read here, because the library maps files into memory, where every page ever touched stays resident until the file
is closed. Here nothing is resident but what was asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ssft.errors import UserError
from megatron_ssft.formats.links import refuse_foreign_link

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_COMPARED_AT_ONCE = 1 << 24  # bytes
_NAMED_AT_MOST = 5
_HARMLESS = (".rotary_emb.inv_freq",)  # stored by old versions, computed by all
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class _Place(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    """From the beginning of the file."""


class HFWeights:
    """The tensors of a Hugging Face folder: `model.safetensors`, or the shards its index names.

    Opening reads headers only.

    Raises:
        UserError: no safetensors there, a shard is missing, damaged or a link out of the folder, the index is wrong,
            or a tensor's dtype is not one of `DTYPES`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, _Place] = {}
        self._files: dict[Path, BinaryIO] = {}
        promised = _weight_files(self.folder)
        for file in dict.fromkeys(promised.values()) or [self.folder / SINGLE]:
            refuse_foreign_link(file, self.folder)
            self._read_header(file)
        for name, file in promised.items():
            if name not in self._places or self._places[name].file != file:
                raise UserError(f"{self.folder / INDEX}: {name} is not in {file.name}; download the folder again")

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that were read."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """A contiguous copy of the given rows and columns, in the stored dtype; None stands for all.

        Memory and bytes read are those of the result.

        Raises:
            UserError: the file cannot be read any more.
        """
        shape, dtype = self.shapes[name], self.dtypes[name]
        assert columns is None or len(shape) == 2, f"columns of {name}, which has shape {shape}"
        top, bottom = _bounds(rows, shape[0])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        begin = self._places[name].offset + top * row_bytes
        if columns is None or _bounds(columns, shape[1]) == (0, shape[1]):  # one run of bytes
            result = torch.empty((bottom - top, *shape[1:]), dtype=dtype)
            self._fill(bytes_of(result), name, begin)
            return result
        first_column, end_column = _bounds(columns, shape[1])
        result = torch.empty((bottom - top, end_column - first_column), dtype=dtype)
        target, width = bytes_of(result), (end_column - first_column) * dtype.itemsize
        for i in range(bottom - top):
            start = begin + i * row_bytes + first_column * dtype.itemsize
            self._fill(target[i * width : (i + 1) * width], name, start)
        return result

    def check_names(self, hf_tensors: dict[str, tuple[int, ...]], where: str) -> None:
        """Refuse a folder whose tensors are not exactly these.

        Rotary frequencies, which every reader computes, may be there. A `lm_head.weight` beside tied embeddings may be
        there if it is bitwise the embedding: otherwise the model is not tied, whatever its config.json says.

        Raises:
            UserError: names what is missing, of another shape, or unused.
        """
        missing_names = [name for name in hf_tensors if name not in self.shapes]
        misshapen_names = [
            f"{name} {list(self.shapes[name])} instead of {list(shape)}"
            for name, shape in hf_tensors.items()
            if self.shapes.get(name, shape) != shape
        ]
        unused_names = [name for name in self.shapes if name not in hf_tensors and not name.endswith(_HARMLESS)]
        extra_head = _HEAD in unused_names and _EMBEDDING in hf_tensors
        if extra_head:
            unused_names.remove(_HEAD)
        findings = [("missing", missing_names), ("of another shape", misshapen_names), ("unused", unused_names)]
        problems = [f"tensors {what}: {_listed(names)}" for what, names in findings if names]
        if problems:
            raise UserError(
                f"{where}: weights and config.json do not describe the same model: {'; '.join(problems)}; "
                "correct config.json or take the folder from its origin"
            )
        if extra_head and not self._same(_HEAD, _EMBEDDING):
            raise UserError(
                f"{where}: config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING}; set "
                '"tie_word_embeddings" to false if the head is meant, or remove it'
            )

    def _same(self, a: str, b: str) -> bool:
        """Whether two tensors are bitwise equal, a block of rows at a time."""
        if self.shapes[a] != self.shapes[b] or self.dtypes[a] != self.dtypes[b]:
            return False
        rows = self.shapes[a][0]
        step = max(1, _COMPARED_AT_ONCE // max(1, math.prod(self.shapes[a][1:]) * self.dtypes[a].itemsize))
        blocks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        return all(torch.equal(self.read(a, s).view(torch.uint8), self.read(b, s).view(torch.uint8)) for s in blocks)

    def _read_header(self, file: Path) -> None:
        for name, dtype, shape, offset in _header(file):
            if name in self._places:
                raise UserError(f"{file}: {name} stands in {self._places[name].file.name} too; remove one of the two")
            if dtype not in DTYPES:
                raise UserError(f"{file}: {name} has dtype {dtype}; only {', '.join(DTYPES)} are supported")
            self.shapes[name], self.dtypes[name] = shape, DTYPES[dtype]
            self._places[name] = _Place(file, offset)

    def _fill(self, target: memoryview, name: str, offset: int) -> None:
        """Read as many bytes as `target` has from a tensor's file; the system hands out at most 2 GiB at a time."""
        path = self._places[name].file
        try:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115
            while target:
                count = os.preadv(file.fileno(), [target], offset)
                if count == 0:
                    raise UserError(f"{path}: ends too early; it was changed while it was read")
                target, offset = target[count:], offset + count
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name to shard, as the index says; empty for a single file, which transformers prefers to an index too."""
    if (folder / SINGLE).is_file():
        return {}
    index = folder / INDEX
    if not index.is_file():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        if any(folder.glob("*.bin")) or any(folder.glob("*.bin.index.json")):
            raise UserError(
                f"{folder}: holds pickled weights only (*.bin), which may run code when read; "
                "convert them to safetensors"
            )
        raise UserError(f"{folder}: holds no weights ({SINGLE} or {INDEX})")
    refuse_foreign_link(index, folder)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({error}); download it again") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f'{index}: has no "weight_map"; download it again')
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: {file!r} is not the name of a safetensors file beside it")
    missing_shards = [file for file in dict.fromkeys(names.values()) if not (folder / file).is_file()]
    if missing_shards:
        raise UserError(f"{folder}: shards are missing: {_listed(sorted(missing_shards))}; download them again")
    return {name: folder / file for name, file in names.items()}


def _header(file: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, offset from the beginning of the file) of every tensor, after the library's checks."""
    try:
        with safe_open(str(file), framework="pt"):  # lengths, offsets without gaps, the file's size
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: is no complete safetensors file ({error}); download it again") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]


def _bounds(part: slice | None, size: int) -> tuple[int, int]:
    if part is None:
        return 0, size
    assert part.step in (None, 1) and 0 <= part.start <= part.stop <= size, f"{part} of {size}"
    return part.start, part.stop


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not a copy."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _listed(names: list[str]) -> str:
    """The first few, and how many there are in all."""
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
