"""Fingerprints (sha256) of Hugging Face folders: whether two hold the same model, or the same tokenizer.

Spelling does not count: not the order of keys, how a number is written, nor how tensors are spread over files. Nothing
is remembered between calls; the weights are read every time, a block at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_ssft.errors import UserError
from megatron_ssft.formats.hf_json import read_json
from megatron_ssft.hf.safetensors_io import HFWeights
from megatron_ssft.tokenizers.hf_folder import TOKENIZER_FILES

_BLOCK_BYTES = 1 << 24
_ENOUGH = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these makes a tokenizer."""
_SAYS_NOTHING = ("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "use_cache")
"""Keys that stand for how a file came about, or how fast a model runs."""


def model_fingerprint(folder: Path) -> str:
    """sha256 hex digest over config.json and every tensor: name, dtype, shape, bytes.

    Takes as long as reading the weights. Raises UserError for a folder without either, and for damaged files.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if "torch_dtype" in config:  # as transformers before version 5 calls it
        config["dtype"] = config.pop("torch_dtype")
    digest = hashlib.sha256(_meaning(config))
    with HFWeights(folder) as weights:
        for name in sorted(weights.shapes):
            shape = weights.shapes[name]
            digest.update(_meaning([name, str(weights.dtypes[name]), list(shape)]))
            for block in _blocks(weights, name):
                digest.update(_bytes_of(block))
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 hex digest over the tokenizer's files, chat template included.

    Raises UserError for a folder without a tokenizer, and for damaged files.
    """
    folder = Path(folder)
    files = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    if not any(file.name in _ENOUGH for file in files):
        raise UserError(f"{folder}: holds no tokenizer ({', '.join(_ENOUGH)})")
    digest = hashlib.sha256()
    for file in files:
        content = _meaning(read_json(file)) if file.suffix == ".json" else _content(file)
        digest.update(_meaning([str(file.relative_to(folder)), len(content)]) + content)
    return digest.hexdigest()


def _meaning(value: object) -> bytes:
    """JSON in one spelling only, closed by a line end."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _plain(value: object) -> object:
    """Without keys that say nothing; whole numbers as integers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in _SAYS_NOTHING}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _blocks(weights: HFWeights, name: str) -> Iterator[Tensor]:
    """The tensor in runs of rows."""
    shape = weights.shapes[name]
    if not shape:
        raise UserError(f"{weights.folder}: {name} is a number of its own, which no supported model has")
    row_bytes = math.prod(shape[1:]) * weights.dtypes[name].itemsize
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield weights.read(name, slice(start, min(start + step, shape[0])))


def _bytes_of(block: Tensor) -> memoryview:
    import torch

    return block.reshape(-1).view(torch.uint8).numpy().data
