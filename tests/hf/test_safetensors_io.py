"""Safetensors folders: slices are exact and cheap, damage is one line, what is written everyone can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ssft.errors import UserError
from megatron_ssft.hf import safetensors_io
from megatron_ssft.hf.safetensors_io import INDEX, SINGLE, HFWeights, ShardWriter

ROOT = Path(__file__).resolve().parents[2]
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
from megatron_ssft.hf.safetensors_io import HFWeights, ShardWriter

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


# -- names -----------------------------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"
WANTED = {EMBEDDING: (6, 4), "model.norm.weight": (4,)}


def checked(folder, wanted=WANTED, **changes):
    """check_names on a folder of `wanted` with changes (None removes)."""
    values = tensors(shapes=WANTED)
    for name, value in changes.items():
        values[name.replace("__", ".")] = value
    save_file({name: value for name, value in values.items() if value is not None}, folder / SINGLE)
    with HFWeights(folder) as weights:
        weights.check_names(wanted, str(folder))


def test_matching_names_pass(tmp_path):
    checked(tmp_path)
    checked(tmp_path, **{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(3)})


def test_missing_wrong_and_unused_are_named_together(tmp_path):
    text = refusal(
        lambda: checked(tmp_path, model__norm__weight=None, model__more=torch.ones(2), **{EMBEDDING: torch.ones(6, 5)})
    )
    assert text.startswith(f"{tmp_path}: ")
    assert "missing: model.norm.weight" in text
    assert "unused: model.more" in text
    assert f"{EMBEDDING} [6, 5] instead of [6, 4]" in text


def test_five_are_named_and_the_rest_counted(tmp_path):
    text = refusal(lambda: checked(tmp_path, **{f"extra{i:02d}": torch.ones(1) for i in range(12)}))
    assert "extra04 and 7 more" in text and "extra05" not in text


def test_missing_bias_is_named(tmp_path):
    """A folder without the biases its family has must not load as if they were zero."""
    text = refusal(lambda: checked(tmp_path, WANTED | {"model.layers.0.self_attn.q_proj.bias": (4,)}))
    assert "model.layers.0.self_attn.q_proj.bias" in text


@pytest.mark.parametrize("block", [1, 16, 40, 1 << 24])
def test_head_beside_tied_embeddings(tmp_path, monkeypatch, block):
    monkeypatch.setattr(safetensors_io, "_COMPARED_AT_ONCE", block)
    table = tensors(shapes=WANTED)[EMBEDDING]
    checked(tmp_path, lm_head__weight=table.clone())
    for row in range(6):
        other = table.clone()
        other[row, 3] = torch.nextafter(other[row, 3], torch.tensor(9.0))
        assert "lm_head.weight differs" in refusal(lambda other=other: checked(tmp_path, lm_head__weight=other))
    for other in (table[:5].clone(), table.bfloat16()):
        assert "lm_head.weight differs" in refusal(lambda other=other: checked(tmp_path, lm_head__weight=other))


def test_bits_decide_not_values(tmp_path):
    """0 and -0 are equal as numbers; NaN equals itself as bits."""
    table = tensors(shapes=WANTED)[EMBEDDING]
    table[2, 2] = float("nan")
    checked(tmp_path, lm_head__weight=table.clone(), **{EMBEDDING: table})
    table[2, 2] = 0.0
    other = table.clone()
    other[2, 2] = -0.0
    assert "differs" in refusal(lambda: checked(tmp_path, lm_head__weight=other, **{EMBEDDING: table}))


def test_untied_model_needs_its_head(tmp_path):
    assert "missing: lm_head.weight" in refusal(lambda: checked(tmp_path, WANTED | {"lm_head.weight": (6, 4)}))


# -- writing ---------------------------------------------------------------------------------------------------------


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
    assert "No space left" in refusal(lambda: write(tmp_path, tensors()))
    assert not list(tmp_path.glob("*.safetensors"))
