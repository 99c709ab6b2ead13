"""Safetensors folders written tensor by tensor."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_ssft.hf.safetensors_io import INDEX, SINGLE, HFWeights
from megatron_ssft.hf.safetensors_writer import ShardWriter
from tests.helpers.safetensors_folders import refusal, tensors


def write(folder, values, max_shard_bytes=10**9):
    writer = ShardWriter(folder, [(n, v.dtype, tuple(v.shape)) for n, v in values.items()], max_shard_bytes)
    for name, value in values.items():
        writer.write(name, value)
    writer.finish()


def load_all(folder):
    """Everything in the folder by the safetensors library, and the files' names."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(folder / file).items()}, files


@pytest.mark.parametrize("limit", [1, 60, 100, 400, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_others_read_what_is_written(tmp_path, dtype, limit):
    values = tensors(dtype)
    write(tmp_path, values, limit)
    loaded, files = load_all(tmp_path)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == dtype for name, value in values.items())
    with HFWeights(tmp_path) as weights:
        assert all(torch.equal(weights.read(name), value) for name, value in values.items())
    assert {path.name for path in tmp_path.iterdir()} == {*files, *([INDEX] if len(files) > 1 else [])}
    if len(files) == 1:
        assert files == [SINGLE]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in values.values())
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    parts = [load_file(tmp_path / file) for file in files]
    sizes = [sum(v.numel() * v.element_size() for v in part.values()) for part in parts]
    assert all(len(part) == 1 or size <= limit for part, size in zip(parts, sizes))
    firsts = [next(v for name, v in values.items() if name in part) for part in parts]  # in planned order
    assert all(size + v.numel() * v.element_size() > limit for size, v in zip(sizes, firsts[1:])), "a shard too early"


def test_mixed_dtypes_stay_aligned(tmp_path):
    """An odd number of 2-byte values before 4-byte ones must not make a file that others cannot map."""
    values = {
        "half": torch.randn(3).half(),
        "single": torch.randn(5, 3),
        "brain": torch.randn(1, 7).bfloat16(),
        "last": torch.randn(2),
    }
    write(tmp_path, values)
    loaded, _ = load_all(tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    content = (tmp_path / SINGLE).read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    assert data % 8 == 0 and header["__metadata__"] == {"format": "pt"}
    assert all(header[name]["data_offsets"][0] % value.element_size() == 0 for name, value in values.items())


def test_views_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    values = {"rows": base[1:3], "columns": base[:, 2:4], "turned": base.T, "learned": torch.nn.Parameter(base[0])}
    write(tmp_path, values)
    loaded, _ = load_all(tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


@pytest.mark.parametrize("limit", [1000, 10**9])
def test_transformers_opens_it(tmp_path, limit):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=33, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    write(tmp_path, model.state_dict(), limit)
    config.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists() == (limit == 1000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_only_the_plan_is_written(tmp_path):
    plan = [("a", torch.float32, (2, 3)), ("b", torch.float32, (4,))]
    for name, tensor in (
        ("b", torch.ones(4)),
        ("a", torch.ones(3, 2)),
        ("a", torch.ones(2, 3).bfloat16()),
        ("c", torch.ones(2, 3)),
    ):
        with pytest.raises(AssertionError):
            ShardWriter(tmp_path, plan).write(name, tensor)
    writer = ShardWriter(tmp_path, plan)
    writer.write("a", torch.ones(2, 3))
    with pytest.raises(AssertionError):
        writer.finish()
    writer.write("b", torch.ones(4))
    with pytest.raises(AssertionError):
        writer.write("b", torch.ones(4))
    writer.finish()


@pytest.mark.parametrize("limit", [30, 10**9])
def test_a_crash_leaves_nothing_that_passes_for_a_model(tmp_path, limit):
    values = {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(2)}
    writer = ShardWriter(tmp_path, [(n, v.dtype, tuple(v.shape)) for n, v in values.items()], limit)
    for name, value in values.items():
        if name == "c" and limit == 10**9:  # one file: complete with its last tensor
            break
        assert not (tmp_path / SINGLE).exists() and not (tmp_path / INDEX).exists()
        writer.write(name, value)
    refusal(lambda: HFWeights(tmp_path))


def test_folder_with_weights_is_not_written_over(tmp_path):
    """transformers prefers a single file to an index: what is left over would win over what is new."""
    write(tmp_path, tensors())
    assert "holds weights already" in refusal(lambda: write(tmp_path, tensors(), 100))


def test_disk_trouble_is_one_line(tmp_path, monkeypatch):
    assert "No such file" in refusal(lambda: write(tmp_path / "absent", tensors()))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refusal(lambda: write(tmp_path, tensors()))
    assert not list(tmp_path.glob("*.safetensors"))
