"""Checkpoints are found, hold what they should, and load at any parallel layout."""

from __future__ import annotations

import os

import numpy as np
import pytest

from megatron_ssft.formats.run_folder import find_latest
from megatron_ssft.parallel.checkpoint.loading import read_state
from tests.helpers.checkpoints import (
    EMBEDDING,
    TAG_IDS,
    TP2_PP2,
    load,
    metadata,
    read_tensors,
    refusal,
    same_state,
    train_and_save,
    try_to_load,
)
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import assemble, make_rows, write_rows

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
    assert read_state(saved[0], 2).iteration == 2


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
