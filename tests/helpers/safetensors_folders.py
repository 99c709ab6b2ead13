"""Small safetensors folders, whole or broken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_ssft.errors import UserError
from megatron_ssft.hf.safetensors_io import INDEX, SINGLE

SHAPES = {"a.weight": (7, 12), "a.bias": (7,), "b.weight": (5, 3), "c.weight": (1, 1)}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def tensors(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(1)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def write_folder(folder, values=None, sharded=True):
    """A folder as Hugging Face's tools write it: two shards with their index, or one file."""
    values = tensors() if values is None else values
    if not sharded:
        save_file(values, folder / SINGLE)
        return folder
    names = list(values)
    parts = [names[:2], names[2:]]
    for file, part in zip(SHARDS, parts):
        save_file({name: values[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in zip(SHARDS, parts) for name in part})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def refusal(action):
    """The one line that `action` is refused with."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)
