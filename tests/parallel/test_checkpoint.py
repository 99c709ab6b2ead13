"""Checkpoints are complete or absent, loadable at any layout, and never run what they hold."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import find_latest
from megatron_ssft.parallel.checkpoint import run_checkpoint as checkpoint
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_foreign_pickles
from megatron_ssft.parallel.checkpoint.run_checkpoint import read_state, save_checkpoint
from megatron_ssft.parallel.topology import initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.training_runs import BASE, assemble, make_rows, weight_shards, write_rows

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
EMBEDDING = "embedding.word_embeddings.weight"
TAG_IDS = range(257, 262)


# -- bodies that run on every rank -----------------------------------------------------------------------------------


def state_of(trainer):
    """What a loaded run must agree in: weights with the tags folded in, the tags' own rows, place in the data."""
    rows = [chunk.forking_rows.weight for chunk in trainer.engine.chunks if chunk.forking_rows is not None]
    return {
        "rows": [row.detach().float().numpy().copy() for row in rows],
        "shards": weight_shards(trainer.engine),
        "iteration": trainer.iteration,
        "queue": trainer.objective.sets.queue.state_dict(),
    }


def build(values):
    config = build_config(values)
    return Trainer(config, initialize_topology(config))


def train_and_save(values, run, *iterations):
    """Save at each of `iterations`, training up to it; the state at the last."""
    trainer = build(values)
    for iteration in iterations:
        while trainer.iteration < iteration:
            trainer.train_step()
        save_checkpoint(trainer.engine, Path(run), iteration, trainer.state())
    return state_of(trainer)


def load(values, save_to=None, steps=0):
    """The state after loading, what further steps make of it, and a copy saved elsewhere."""
    trainer = build(values)
    result = state_of(trainer)
    if save_to is not None:
        save_checkpoint(trainer.engine, Path(save_to), trainer.iteration, trainer.state())
    losses = [trainer.train_step()[1]["loss"] for _ in range(steps)]
    return result | {"losses": losses}


def try_to_load(values):
    """The UserError of a start with these values; None if it worked."""
    try:
        build(values)
    except UserError as error:
        return str(error)
    return None


def die_while_saving(values, run, moment):
    """Train two steps more and save; the process ends like a killed one at the named moment."""
    trainer = build(values)
    trainer.train_step()
    trainer.train_step()
    real_rename, real_rmtree = os.rename, shutil.rmtree

    def rename(source, target):
        is_checkpoint = Path(target).name == "iter_0000004"
        os._exit(9) if is_checkpoint and moment == "before rename" else real_rename(source, target)
        os._exit(9) if is_checkpoint and moment == "after rename" else None

    def rmtree(folder, **kwargs):
        """Removes half of the files that stand in a folder, never our own state."""
        names = sorted({path.name for path in Path(folder).glob("*")} - {"train_state.json"})
        for name in names[: len(names) // 2]:
            (Path(folder) / name).unlink()
        os._exit(9) if names else real_rmtree(folder, **kwargs)

    if moment in ("before rename", "after rename"):
        os.rename = rename
    elif moment == "while removing":
        shutil.rmtree = rmtree
    elif moment == "while writing":
        checkpoint.barrier = lambda topology: os._exit(9)
    save_checkpoint(trainer.engine, Path(run), trainer.iteration, trainer.state())


# -- runs to look at -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return BASE | {
        "data_path": [write_rows(folder / "train.jsonl", make_rows())],
        "data_cache_path": str(folder / "cache"),
        "make_vocab_size_divisible_by": 8,
    }


@pytest.fixture(scope="module")
def saved(values, tmp_path_factory):
    """(run folder with checkpoints 1 and 2 of one rank, its state at 2)."""
    run = tmp_path_factory.mktemp("saved")
    return run, run_ranks(1, train_and_save, values, str(run), 1, 2)


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of that run, to be damaged, with its older checkpoint taken away."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    shutil.rmtree(run / "iter_0000001")
    return run


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_state(one, other):
    """Whether two lists of rank results agree to the bit."""
    a, b = assemble(one), assemble(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = [rows for result in [*one, *other] for rows in result["rows"]]
    for other_rows in rows[1:]:
        np.testing.assert_array_equal(rows[0], other_rows)
    np.testing.assert_array_equal(rows[0], a[EMBEDDING][TAG_IDS])
    assert {json.dumps([r["iteration"], r["queue"]]) for r in [*one, *other]} == {
        json.dumps([one[0]["iteration"], one[0]["queue"]])
    }


# -- which checkpoint is the newest ----------------------------------------------------------------------------------


def make_run(run, *iterations, tracker=None):
    for iteration in iterations:
        folder = run / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / "train_state.json").write_text("{}")
    if tracker is not None:
        (run / "latest_checkpointed_iteration.txt").write_bytes(tracker)
    return run


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        (b"10", 10),
        (b"20\n", 20),
        (None, 20),
        (b"", 20),  # empty
        (b"\n", 20),
        (b"2", 20),  # torn: half of "20"
        (b"30", 20),  # stale: its folder was removed
        (b"-10", 20),
        (b"release", 20),
        (b"1e1", 20),
        (b"\0\0\0\0", 20),
        (b"\xff\xfe", 20),
        ("²".encode(), 20),  # a digit to str.isdigit, not to int
    ],
)
def test_find_latest_by_the_tracker(tmp_path, tracker, expected):
    assert find_latest(make_run(tmp_path, 10, 20, tracker=tracker)) == expected


def test_partial_folders_are_passed_over(tmp_path):
    make_run(tmp_path, 10, 9, tracker=b"30")
    (tmp_path / ".iter_0000040.partial").mkdir()
    (tmp_path / ".iter_0000040.partial" / "train_state.json").write_text("{}")
    (tmp_path / "iter_0000030").mkdir()  # copied by hand and not finished
    (tmp_path / "iter_0000050").write_text("a file")
    (tmp_path / "iter_0000060.old").mkdir()
    (tmp_path / "iter_0000060.old" / "train_state.json").write_text("{}")
    (tmp_path / "iter_70").mkdir()
    assert find_latest(tmp_path) == 10


def test_more_than_seven_digits(tmp_path):
    assert find_latest(make_run(tmp_path, 9999999, 10000000)) == 10000000


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint(tmp_path, exists):
    run = tmp_path / "run"
    if exists:
        make_run(run, tracker=b"10") if run.mkdir() is None else None
    assert refusal(find_latest, run).startswith(f"--load {run}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"iteration": 1', b"\xff\xfe", b"[]", b"null", b"{}", b'{"model": 1}']
)
def test_damaged_state(copy, values, content):
    """Whatever is wrong with our own state, it is said in one line."""
    path = copy / "iter_0000002" / "train_state.json"
    path.write_bytes(content)
    assert str(copy) in run_ranks(1, try_to_load, values | {"load": str(copy)})[0]


def test_missing_state(tmp_path):
    make_run(tmp_path, 10)
    (tmp_path / "iter_0000010" / "train_state.json").unlink()
    assert refusal(read_state, tmp_path, 10).startswith(f"{tmp_path}/iter_0000010/train_state.json: ")


# -- what a checkpoint holds -----------------------------------------------------------------------------------------


def metadata(folder):
    return dcp.FileSystemReader(folder).read_metadata()


def read_tensors(folder, *keys):
    sizes = {key: metadata(folder).state_dict_metadata[key] for key in keys}
    state = {key: torch.zeros(m.size, dtype=m.properties.dtype) for key, m in sizes.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return [state[key].numpy() for key in keys]


def test_tags_stand_in_the_embedding_and_nowhere_else(saved):
    run, (state,) = saved
    keys = list(metadata(run / "iter_0000002").state_dict_metadata)
    model = [key for key in keys if not key.startswith("optimizer.")]
    assert EMBEDDING in model
    assert [key for key in model if "forking" in key] == []
    old, new = (read_tensors(run / f"iter_000000{i}", EMBEDDING)[0] for i in (1, 2))
    np.testing.assert_array_equal(new[TAG_IDS], state["rows"][0])
    assert (new[TAG_IDS] != old[TAG_IDS]).any(axis=1).all()  # every tag was trained in between


def test_optimizer_state_of_the_tags_is_kept(saved):
    moments = read_tensors(saved[0] / "iter_0000002", "optimizer.state.exp_avg.forking_rows.weight")[0]
    assert moments.shape == (5, 32) and np.abs(moments).max() > 0


def test_run_folder_holds_checkpoints_tracker_and_nothing_else(saved):
    assert sorted(os.listdir(saved[0])) == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]
    assert (saved[0] / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert read_state(saved[0], 2)["iteration"] == 2


# -- any layout ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_distributed_optimizer": True}], ids=["plain", "distributed optimizer"])
def test_layout_changes_there_and_back(values, tmp_path, more):
    """TP2 x PP2 to one rank and back to TP2 x PP2 is the identity, and training goes on alike."""
    one, four = values | more, values | more | TP2_PP2
    trained = run_ranks(4, train_and_save, four, str(tmp_path / "a"), 2)
    alone = run_ranks(1, load, one | {"load": str(tmp_path / "a")}, str(tmp_path / "b"), 1)
    back = run_ranks(4, load, four | {"load": str(tmp_path / "b")}, None, 1)
    same_state(trained, alone)
    same_state(trained, back)
    assert alone[0]["losses"] == pytest.approx(back[0]["losses"], rel=1e-5)


def test_weights_only(saved, values):
    """--finetune takes the weights and starts at step 0, at the beginning of the data, with a fresh optimizer."""
    run, trained = saved
    fresh = run_ranks(1, load, values | {"train_iters": 9})
    tuned = run_ranks(1, load, values | {"load": str(run), "finetune": True, "lr": 1e-3}, None, 1)
    assert (trained[0]["iteration"], tuned[0]["iteration"]) == (2, 0)
    assert tuned[0]["queue"] == fresh[0]["queue"] != trained[0]["queue"]
    same_state(trained, [tuned[0] | {name: trained[0][name] for name in ("iteration", "queue")}])
    assert not np.array_equal(assemble(fresh)[EMBEDDING], assemble(tuned)[EMBEDDING])


def test_weights_only_takes_other_data_and_optimizer(saved, values, tmp_path):
    path = write_rows(tmp_path / "other.jsonl", make_rows(seed=9))
    changes = {"load": str(saved[0]), "finetune": True, "data_path": [path], "use_distributed_optimizer": True}
    tuned = run_ranks(1, load, values | changes | {"seed": 5}, None, 1)
    np.testing.assert_array_equal(assemble(tuned)[EMBEDDING], assemble(saved[1])[EMBEDDING])
    assert np.isfinite(tuned[0]["losses"]).all()


# -- killed while saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "latest"), [("while writing", 2), ("before rename", 2), ("after rename", 4), ("while removing", 4)]
)
def test_killed_while_saving(saved, values, tmp_path, moment, latest):
    """A checkpoint that was complete stays so; the next run overwrites what was left behind."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    again = values | {"load": str(run)}
    if moment == "while removing":  # the run goes back to step 2 and comes to step 4 once more
        run_ranks(1, load_and_save_at, again, str(run), 4)
        (run / checkpoint.TRACKER).write_text("2")
    before = files(run / "iter_0000002")
    with pytest.raises(RankFailure, match="exit code 9"):
        run_ranks(1, die_while_saving, again, str(run), moment)
    assert files(run / "iter_0000002") == before
    found = find_latest(run)
    assert found in (latest, 2)
    (run / checkpoint.TRACKER).unlink()  # the newest folder is complete even where nothing vouches for it
    state = run_ranks(1, load, again)
    assert state[0]["iteration"] >= latest
    if state[0]["iteration"] == 2:
        same_state(saved[1], state)
    expected = run_ranks(1, load_and_save_at, values | {"load": str(saved[0])}, str(tmp_path / "other"), 4)
    same_state(expected, run_ranks(1, load_and_save_at, again, str(run), 4))
    assert find_latest(run) == 4
    same_state(expected, run_ranks(1, load, again))


def load_and_save_at(values, run, iteration):
    """Go on to a step and save there."""
    return train_and_save(values, run, iteration)


def test_disk_full_leaves_the_older_checkpoint(saved, values, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    before = files(run)
    with pytest.raises(RankFailure, match="No space left"):
        run_ranks(1, save_on_a_full_disk, values | {"load": str(run)}, str(run))
    assert {path: text for path, text in files(run).items() if "partial" not in str(path)} == before
    assert find_latest(run) == 2


def save_on_a_full_disk(values, run):
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = build(values)
    trainer.train_step()
    torch.save, real = fail, torch.save
    FileSystemWriterAsync.write_preloaded_data = staticmethod(fail)
    try:
        save_checkpoint(trainer.engine, Path(run), 3, trainer.state())
    finally:
        torch.save = real


# -- damage ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "shard cut": ("__0_0.distcp", lambda content: content[: len(content) // 2]),
    "shard empty": ("__0_0.distcp", lambda content: b""),
    "shard of zeros": ("__0_0.distcp", lambda content: bytes(len(content))),
    "shard missing": ("__0_0.distcp", None),
    "common.pt cut": ("common.pt", lambda content: content[: len(content) // 2]),
    "common.pt empty": ("common.pt", lambda content: b""),
    "common.pt missing": ("common.pt", None),
    "metadata.json cut": ("metadata.json", lambda content: content[:3]),
    "metadata.json empty": ("metadata.json", lambda content: b""),
    "metadata.json missing": ("metadata.json", None),
    ".metadata cut": (".metadata", lambda content: content[: len(content) // 2]),
    ".metadata empty": (".metadata", lambda content: b""),
    ".metadata missing": (".metadata", None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused_in_one_line(copy, values, name):
    file, change = DAMAGE[name]
    path = copy / "iter_0000002" / file
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    error = run_ranks(1, try_to_load, values | {"load": str(copy)})[0]
    assert error is not None and str(copy / "iter_0000002") in error and "\n" not in error


def test_damage_seen_by_one_rank_ends_both(values, tmp_path):
    """The shard of one rank is cut: every rank ends with the same line, and none waits for another."""
    two = values | {"tensor_model_parallel_size": 2}
    run_ranks(2, train_and_save, two, str(tmp_path), 1)
    path = tmp_path / "iter_0000001" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:100])
    errors = run_ranks(2, try_to_load, two | {"load": str(tmp_path)}, timeout=60)
    assert None not in errors and len(set(errors)) == 1


# -- foreign pickles -------------------------------------------------------------------------------------------------


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
    same_state(saved[1], run_ranks(1, load, values | {"load": str(copy)}))
