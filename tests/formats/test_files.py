"""Writing that leaves the old or the new, whatever goes wrong in between."""

from __future__ import annotations

import errno

import pytest

from megatron_ssft.formats import files
from megatron_ssft.formats.files import new_folder, publish_folder, publish_new_folder, whole_file, write_durably


class Stop(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "f"
    write_durably(path, "old\u2028")
    with pytest.raises(Stop), whole_file(path) as file:
        file.write("half")
        raise Stop
    assert path.read_text() == "old\u2028" and names(tmp_path) == ["f"]
    with whole_file(path) as file:
        file.write("new")
        assert path.read_text() == "old\u2028"
    assert path.read_text() == "new" and names(tmp_path) == ["f"] and path.stat().st_mode & 0o777 == 0o644


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "d"
    for content in ("one", "two"):
        with new_folder(path) as fresh:
            (fresh / content).write_text(content)
        assert names(path) == [content] and names(path.parent) == ["d"]
    with pytest.raises(Stop), new_folder(path) as fresh:
        (fresh / "three").write_text("")
        raise Stop
    assert names(path) == ["two"] and names(path.parent) == ["d"]


def test_a_folder_that_others_filled_gets_its_name(tmp_path):
    for content in ("one", "two"):
        (tmp_path / ".d.partial").mkdir()
        (tmp_path / ".d.partial" / content).write_text("")
        (tmp_path / ".d.old").mkdir(exist_ok=True)  # left by a crash
        (tmp_path / ".d.old" / "rest").write_text("")
        publish_folder(tmp_path / ".d.partial", tmp_path / "d")
        assert names(tmp_path / "d") == [content]
    assert names(tmp_path) == ["d"]


def test_a_new_folder_replaces_none(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "ours").write_text("")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "theirs").write_text("")
    with pytest.raises(OSError, match="not empty"):
        publish_new_folder(tmp_path / "partial", tmp_path / "d")
    assert names(tmp_path / "d") == ["theirs"] and names(tmp_path / "partial") == ["ours"]
    publish_new_folder(tmp_path / "partial", tmp_path / "new")
    assert names(tmp_path / "new") == ["ours"]


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_durably(path, "old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync_file", full)
    with pytest.raises(OSError, match="latest"):
        write_durably(path, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("latest", "old")]
