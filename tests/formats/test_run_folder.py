"""What a kill left in a run folder goes at the next start, and what it took away comes back."""

from __future__ import annotations

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import new_folder, whole_file
from megatron_ssft.formats.run_folder import (
    begin_import,
    checkpoints_from_newest,
    clear_leftovers,
    end_import,
    find_latest,
)


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def make(run, *files):
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    return run


SOUND = (
    "iter_0000001/train_state.json",
    "iter_0000001/hf/config.json",
    "hf/tokenizer.json",
    "config.yaml",
    "metrics.jsonl",
    "note.partial",  # whose it is is not known
    "tensorboard/x.tmp.y",
)


def test_parts_of_files_and_folders_go_wherever_they_are_made(tmp_path):
    make(tmp_path, *SOUND)
    before = tree(tmp_path)
    make(
        tmp_path,
        "config.yaml.tmp",
        ".policy.jsonl.abc.tmp",
        ".iter_0000002.q1.partial/common.pt",
        ".iter_0000001.old/common.pt",
        ".hf.q2.partial/hf/config.json",
        ".hf.old/tokenizer.json",
        "iter_0000001/.hf.partial/.assets.q3/assets/config.json",
        "iter_0000001/manifest.json.tmp",
    )
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == before


def test_what_made_way_comes_back(tmp_path):
    make(tmp_path, *SOUND)
    before = tree(tmp_path)
    for name in ("hf", "iter_0000001"):
        (tmp_path / name).rename(tmp_path / f".{name}.old")
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == before


def test_the_writers_of_files_use_names_that_are_known_as_parts(tmp_path):
    """A kill runs no cleaning: what stands there at the worst moment is what the next start must know."""
    names = set()
    with whole_file(tmp_path / "f") as file:
        file.write("x")
        names |= {path.name for path in tmp_path.iterdir()}
    with new_folder(tmp_path / "d") as fresh:
        (fresh / "x").write_text("x")
        names |= {path.name for path in tmp_path.iterdir()} - {"f"}
    work = make(tmp_path / "work", *names)
    assert len(names) == 2
    clear_leftovers(work)
    assert tree(work) == set()


def test_an_import_that_was_killed_counts_for_nothing(tmp_path):
    begin_import(tmp_path, "{}")
    make(
        tmp_path, "iter_0000000/train_state.json", "hf/config.json", "config.yaml", "latest_checkpointed_iteration.txt"
    )
    for find in (find_latest, checkpoints_from_newest):
        with pytest.raises(UserError, match="did not come to its end; repeat"):
            find(tmp_path)
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == set()


def test_a_finished_import_is_left_alone(tmp_path):
    begin_import(tmp_path, "{}")
    make(tmp_path, "iter_0000000/train_state.json", "hf/config.json", "config.yaml")
    end_import(tmp_path)
    before = tree(tmp_path)
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == before and find_latest(tmp_path) == 0


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        (b"9" * 5000, [30, 20, 10]),
        (b"1" * 19, [30, 20, 10]),
        (b"20", [20, 10]),  # the run went back: 30 is of another future
        (b"0" * 16 + b"20", [20, 10]),
        (b"40", [30, 20, 10]),
    ],
)
def test_checkpoints_from_the_newest_on(tmp_path, tracker, expected):
    make(tmp_path, *(f"iter_{i:07d}/train_state.json" for i in (10, 20)), "iter_0000030/common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(tracker)
    assert checkpoints_from_newest(tmp_path) == expected
    assert find_latest(tmp_path) == 20
