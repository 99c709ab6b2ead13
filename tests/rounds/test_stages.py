"""The loop's record of its stages, and the choice of the checkpoint that a stage begins with."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.rounds.stages import StageFile, newest_checkpoint


def test_the_newest_complete_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None and newest_checkpoint(tmp_path) is None
    for step in (5, 10, 12):
        (tmp_path / f"iter_{step:07d}").mkdir()
    for step in (5, 10):
        (tmp_path / f"iter_{step:07d}" / "train_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "iter_0000010"  # 12 is torn
    for text, expected in (("5", 5), ("12", 10), ("", 10), ("10", 10)):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        assert newest_checkpoint(tmp_path).name == f"iter_{expected:07d}"


def test_the_record_of_stages_as_it_is_written(tmp_path):
    path = tmp_path / "stages.json"
    stages = StageFile(path, tmp_path)
    assert stages.begin("score", [tmp_path / "data", "--lr", 0.1])
    stages.finish("score", 1.23456)
    assert stages.begin("train", ["--seed", 7])
    expected = {
        "score": {"arguments": ["data", "--lr", "0.1"], "seconds": 1.235},
        "train": {"arguments": ["--seed", "7"]},
    }
    assert path.read_text() == json.dumps(expected, indent=1) + "\n"
    again = StageFile(path, tmp_path)
    assert not again.begin("score", [tmp_path / "data", "--lr", 0.1]) and again.begin("train", ["--seed", 7])


@pytest.mark.parametrize("text", ["[]", "{", '{"train": []}', '{"train": {}}', '{"train": {"arguments": "--lr"}}'])
def test_a_damaged_record_of_stages_is_one_line(tmp_path, text):
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(UserError, match="stages.json") as error:
        StageFile(tmp_path / "stages.json", tmp_path)
    assert "\n" not in str(error.value)
