"""Reading a checkpoint never runs what it holds."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_foreign_pickles
from tests.helpers.checkpoints import (
    EMBEDDING,
    load,
    metadata,
    refusal,
    reseal,
    same_state,
    try_to_load,
)
from tests.helpers.distributed import run_ranks


class Bomb:
    """A pickle of it runs a command when it is opened."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


class QuietBomb(Bomb):
    """Ends as a harmless value, so that nothing else need go wrong afterwards."""

    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r}) and 0",)


@pytest.mark.parametrize("bomb", [Bomb, QuietBomb])
@pytest.mark.parametrize("protocol", range(6))
def test_planted_command_in_the_metadata_is_refused(tmp_path, bomb, protocol):
    marker = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": bomb(marker)}, protocol=protocol))
    line = refusal(refuse_foreign_pickles, tmp_path)
    assert line.startswith(f"{tmp_path}/.metadata: refused") and ("system" in line or "eval" in line)
    assert not marker.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())  # noqa: S301 - to see that it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch", "hub"),
        ("torch", "serialization.os.system"),
        ("torch.serialization", "os"),
        ("pathlib", "os.system"),
        ("collections", "namedtuple"),
        ("builtins", "getattr"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.planner", "io.open"),
        ("megatron_ssft.parallel.checkpoint.run_checkpoint", "shutil"),
        ("", "x"),
        ("no.such.module", "x"),
    ],
)
def test_names_outside_the_list_are_refused(tmp_path, module, name):
    """Dotted names reach through modules in newer protocols."""
    encoded = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + encoded[0] + encoded[1] + b"\x93.")
    assert refusal(refuse_foreign_pickles, tmp_path).startswith(f"{tmp_path}/.metadata: ")


class Attribute:
    """Pickled as getattr(owner, name), as some Python versions write the member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_getattr_reaches_members_of_enumerations_only(tmp_path):
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(Metadata({}, planner_data=Attribute(WriteItemType, "TENSOR"))))
    assert refuse_foreign_pickles(tmp_path).planner_data is WriteItemType.TENSOR
    for owner, name in [(WriteItemType, "__subclasses__"), (torch.Size, "count"), (Metadata, "__init__")]:
        path.write_bytes(pickle.dumps(Metadata({}, planner_data=Attribute(owner, name))))
        assert "builtins.getattr" in refusal(refuse_foreign_pickles, tmp_path)


def test_own_metadata_passes(saved):
    refuse_foreign_pickles(saved[0] / "iter_0000002")


def test_cut_metadata_is_refused_wherever_it_is_cut(saved, tmp_path):
    content = (saved[0] / "iter_0000002" / ".metadata").read_bytes()
    for length in [*range(40), *range(40, len(content), 97), len(content) - 1]:
        (tmp_path / ".metadata").write_bytes(content[:length])
        assert str(tmp_path) in refusal(refuse_foreign_pickles, tmp_path)


def test_changed_bytes_end_in_one_line_or_pass(saved, tmp_path):
    """No damage to the metadata ends in anything but a UserError."""
    content = (saved[0] / "iter_0000002" / ".metadata").read_bytes()
    draws = random.Random(1)
    for _ in range(600):
        changed = bytearray(content)
        for _ in range(draws.choice((1, 1, 3, 20))):
            changed[draws.randrange(len(changed))] = draws.randrange(256)
        (tmp_path / ".metadata").write_bytes(changed)
        try:
            refuse_foreign_pickles(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)


def test_planted_command_in_common_pt_is_refused(copy, values, tmp_path):
    path = copy / "iter_0000002" / "common.pt"
    state = torch.load(path)
    torch.save(state | {"extra": Bomb(tmp_path / "ran")}, path)
    reseal(path.parent)
    error = run_ranks(1, try_to_load, values | {"load": str(copy)})[0]
    assert not (tmp_path / "ran").exists()
    assert error is not None and str(copy / "iter_0000002") in error and "\n" not in error


def plant_bytes(folder, key, payload):
    """Make the checkpoint say that `key` is a pickled object, and put `payload` where it looks for it."""
    with open(folder / ".metadata", "rb") as file:
        meta = pickle.load(file)  # noqa: S301 - written by this test
    entry = next(iter(meta.storage_data.values()))
    shard = folder / entry.relative_path
    place = dataclasses.replace(entry, offset=shard.stat().st_size, length=len(payload))
    meta.state_dict_metadata[key] = BytesStorageMetadata()
    for index in [index for index in meta.storage_data if index.fqn == key]:
        del meta.storage_data[index]
    meta.storage_data[MetadataIndex(key)] = place
    with open(shard, "ab") as file:
        file.write(payload)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(meta, file)
    reseal(folder)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.self_attention.linear_proj._extra_state/shard_0_4",  # megatron-core's layers may store one
        "decoder.final_layernorm.weight",  # a tensor in every other checkpoint
        EMBEDDING,
        "optimizer.state.exp_avg.forking_rows.weight",
    ],
)
@pytest.mark.parametrize("finetune", [False, True])
def test_planted_command_in_a_shard_is_not_run(copy, values, tmp_path, key, finetune):
    """Objects in the shards are pickles that the checkpoint library opens without any check."""
    payload = io.BytesIO()
    torch.save(Bomb(tmp_path / "ran"), payload)
    plant_bytes(copy / "iter_0000002", key, payload.getvalue())
    changes = {"load": str(copy), "finetune": finetune}
    try:
        error = run_ranks(1, try_to_load, values | changes)[0]
    finally:
        assert not (tmp_path / "ran").exists()
    assert error is None or (str(copy / "iter_0000002") in error and "\n" not in error)


def test_trial_of_the_planting(saved, copy, values):
    """Rewriting the metadata as such harms nothing: the same checkpoint loads."""
    meta = metadata(copy / "iter_0000002")
    with open(copy / "iter_0000002" / ".metadata", "wb") as file:
        pickle.dump(meta, file)
    reseal(copy / "iter_0000002")
    same_state(saved[1], run_ranks(1, load, values | {"load": str(copy)}))
