"""A run folder after a kill: what is left of files and checkpoints goes, what was made way for comes back."""

from __future__ import annotations

import pytest

from megatron_ssft.formats.run_folder import clear_leftovers


def tree(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_text() for path in folder.rglob("*")}


def put(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_clean_folder_stays_as_it_is(tmp_path):
    put(tmp_path / "iter_0000004", state="4")
    put(tmp_path / "hf", model="m")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = tree(tmp_path)
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == before


def test_parts_of_files_and_checkpoints_go(tmp_path):
    put(tmp_path / "iter_0000004", state="4")
    before = tree(tmp_path)
    put(tmp_path / ".iter_0000008.ab12.partial" / "deep", shard="half")
    put(tmp_path / ".iter_0000004.old", state="earlier")
    (tmp_path / ".config.yaml.x1.tmp").write_text("la")
    (tmp_path / "latest.tmp").write_text("")
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == before


def test_a_checkpoint_that_made_way_for_none_comes_back(tmp_path):
    put(tmp_path / ".iter_0000004.old", state="4")
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == {"iter_0000004": True, "iter_0000004/state": "4"}


@pytest.mark.parametrize("name", [".iter_0000004.partial", "x.tmp"])
def test_a_link_goes_and_what_it_names_stays(tmp_path, name):
    put(tmp_path / "elsewhere", precious="p")
    put(tmp_path / "run")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    clear_leftovers(tmp_path / "run")
    assert tree(tmp_path) == {"elsewhere": True, "elsewhere/precious": "p", "run": True}
