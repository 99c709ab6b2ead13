"""Safetensors folders read slice by slice, and those that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ssft.hf.safetensors_io import INDEX, SINGLE, HFWeights
from tests.helpers.paths import ROOT
from tests.helpers.safetensors_folders import SHAPES, SHARDS, refusal, tensors, write_folder, write_index

# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [True, False])
def test_every_slice_is_exact(tmp_path, dtype, sharded):
    values = tensors(dtype)
    with HFWeights(write_folder(tmp_path, values, sharded)) as weights:
        assert weights.shapes == SHAPES
        assert set(weights.dtypes.values()) == {dtype}
        for name, value in values.items():
            assert torch.equal(weights.read(name), value)
            for start in range(len(value) + 1):
                for stop in range(start, len(value) + 1):
                    assert torch.equal(weights.read(name, slice(start, stop)), value[start:stop])
        for left in range(13):
            for right in range(left, 13):
                read = weights.read("a.weight", slice(2, 6), slice(left, right))
                assert torch.equal(read, values["a.weight"][2:6, left:right]) and read.is_contiguous()
        read = weights.read("a.weight", None, slice(3, 4))
        assert torch.equal(read, values["a.weight"][:, 3:4])
        read.zero_()  # a copy: the folder is out of reach
        assert torch.equal(weights.read("a.weight"), values["a.weight"])


@pytest.mark.parametrize("bad", [slice(0, 8), slice(-1, 3), slice(4, 2), slice(0, 4, 2)])
def test_slices_outside_a_tensor_are_no_question(tmp_path, bad):
    with HFWeights(write_folder(tmp_path)) as weights, pytest.raises(AssertionError):
        weights.read("a.weight", bad)


def test_reads_are_put_together_when_the_system_hands_out_less(tmp_path, monkeypatch):
    """One call gives at most 2 GiB; here at most 5 bytes."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:5]], offset))
    values = tensors()
    with HFWeights(write_folder(tmp_path, values)) as weights:
        assert all(torch.equal(weights.read(name), value) for name, value in values.items())


def bytes_read():
    """Bytes this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_reads_no_more_than_asked(tmp_path):
    save_file({"w": torch.zeros(4096, 1024)}, tmp_path / SINGLE)  # 16 MiB
    own = -bytes_read() + bytes_read()  # looking costs something too
    before = bytes_read()
    with HFWeights(tmp_path) as weights:
        assert bytes_read() - before < own + 16384, "opening reads the header"
        for part, size in (
            ((slice(100, 200), None), 100 * 4096),
            ((slice(0, 4096), slice(8, 16)), 4096 * 32),
            ((slice(5, 6), slice(0, 1024)), 4096),
        ):
            before = bytes_read()
            weights.read("w", *part)
            assert size <= bytes_read() - before <= size + own + 1024


MEMORY_PROBE = """
import sys, torch
from pathlib import Path
from megatron_ssft.hf.safetensors_io import HFWeights
from megatron_ssft.hf.safetensors_writer import ShardWriter

def peak_growth(action):
    # MiB above what is resident now, at the worst moment of `action`
    status = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) >> 10
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    action()
    return status("VmHWM") - before

MIB, COUNT = 16, 12  # tensors of 16 MiB, 192 MiB in all
shape = (MIB << 9, 1024)
folder = Path(sys.argv[1])
warm = torch.ones(1000).bfloat16().sum()

def write():
    writer = ShardWriter(folder, [(f"t{i}", torch.bfloat16, shape) for i in range(COUNT)], max_shard_bytes=100 << 20)
    for i in range(COUNT):
        writer.write(f"t{i}", torch.full(shape, i, dtype=torch.bfloat16))
    writer.finish()

def read():
    rows, columns = slice(0, shape[0] // 4), slice(0, 256)
    with HFWeights(folder) as weights:
        for i in range(COUNT):
            assert weights.read(f"t{i}", rows).sum().item() == i * rows.stop * 1024
            assert weights.read(f"t{i}", None, columns)[0, 0] == i

def compare():
    with HFWeights(folder) as weights:
        assert weights._same("t1", "t1") and not weights._same("t1", "t2")

print(peak_growth(write), peak_growth(read), peak_growth(compare))
"""


def test_memory_is_that_of_one_tensor_or_slice(tmp_path):
    """192 MiB are written with one tensor of 16 MiB at a time, and read with slices of 4 MiB at a time."""
    # What is freed goes back at once, as it does by default for tensors above 32 MiB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written, read, compared = map(int, done.stdout.split())
    assert written <= 16 + 8
    assert read <= 2 * 4 + 8  # rows and columns of one tensor
    assert compared <= 2 * 16 + 8


# -- folders that are refused ----------------------------------------------------------------------------------------


def test_missing_folder_and_folders_without_weights(tmp_path):
    assert "no such folder" in refusal(lambda: HFWeights(tmp_path / "absent"))
    assert "holds no weights" in refusal(lambda: HFWeights(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refusal(lambda: HFWeights(tmp_path))


def test_missing_shard(tmp_path):
    write_folder(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert SHARDS[1] in refusal(lambda: HFWeights(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\x00\x01", "null"],
)
def test_broken_index(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert str(tmp_path / INDEX) in refusal(lambda: HFWeights(tmp_path))


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ".."])
def test_index_names_files_beside_it_only(tmp_path, file):
    write_index(tmp_path, {"a.weight": file})
    assert file in refusal(lambda: HFWeights(tmp_path))


def test_index_does_not_lead_elsewhere(tmp_path):
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "other", sharded=False)
    (tmp_path / "folder").mkdir()
    write_index(tmp_path / "folder", dict.fromkeys(SHAPES, f"../other/{SINGLE}"))
    assert "beside it" in refusal(lambda: HFWeights(tmp_path / "folder"))


def test_index_and_shards_disagree(tmp_path):
    write_folder(tmp_path)
    right = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    write_index(tmp_path, right | {"ghost.weight": SHARDS[0]})
    assert "ghost.weight" in refusal(lambda: HFWeights(tmp_path))
    write_index(tmp_path, right | {"a.bias": SHARDS[1]})
    assert "a.bias" in refusal(lambda: HFWeights(tmp_path))
    save_file(tensors(), tmp_path / SHARDS[1])
    assert "too" in refusal(lambda: HFWeights(write_same_index(tmp_path, right)))


def write_same_index(folder, weight_map):
    write_index(folder, weight_map)
    return folder


def test_tensor_the_index_does_not_list_is_seen(tmp_path):
    write_folder(tmp_path)
    right = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    write_index(tmp_path, {name: file for name, file in right.items() if name != "c.weight"})
    assert "c.weight" in HFWeights(tmp_path).shapes


@pytest.mark.parametrize("damage", ["truncated", "empty", "pointer", "header", "grown"])
def test_damaged_file(tmp_path, damage):
    file = write_folder(tmp_path, sharded=False) / SINGLE
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[:-1],
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "header": content[:20] + b"!" + content[21:],
            "grown": content + b"x",
        }[damage]
    )
    assert str(file) in refusal(lambda: HFWeights(tmp_path))


def test_file_that_shrinks_while_it_is_read(tmp_path):
    write_folder(tmp_path, sharded=False)
    with HFWeights(tmp_path) as weights:
        os.truncate(tmp_path / SINGLE, 100)
        assert "ends too early" in refusal(lambda: weights.read("a.weight"))
        (tmp_path / SINGLE).unlink()
    assert "cannot be read" in refusal(lambda: weights.read("a.weight"))


def test_dtype_that_is_not_supported(tmp_path):
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / SINGLE)
    text = refusal(lambda: HFWeights(tmp_path))
    assert "I8" in text and "a " in text
