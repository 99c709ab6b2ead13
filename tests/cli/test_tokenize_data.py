"""prepare-data tokenize fills the cache that train reads."""

from __future__ import annotations

import shutil

import pytest

from megatron_ssft.cli import prepare_data
from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.data import cache
from megatron_ssft.errors import UserError
from megatron_ssft.objectives import sets
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows


@pytest.fixture
def values(tmp_path):
    data, held_out = (write_rows(tmp_path / f"{name}.jsonl", make_rows()) for name in ("train", "held_out"))
    return BASE | {"data_path": data, "eval_data_path": held_out, "save": str(tmp_path / "run"), "eval_interval": 2}


def test_train_finds_what_was_tokenized(values, tmp_path, capsys, monkeypatch):
    prepare_data.main(["tokenize", *flags(values)])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["train", "eval"]
    moved = shutil.copy(values["data_path"], tmp_path / "moved.jsonl")
    config = build_config(values | {"data_path": [moved], "eval_data_path": [values["eval_data_path"]]}, SSFTConfig)
    monkeypatch.setattr(cache, "tokenize_shards", lambda *_: pytest.fail("tokenized again"))
    folders = sets.prepare_data(config, build_vocabulary(config.run))
    assert [line.rpartition(": ")[2] for line in said] == list(folders.values())
    assert cache.SetDataset.open(folders["train"], config.data.data_path)[0].where == f"{moved}:1"


def test_bad_rows_and_flags_without_use_are_refused(values, tmp_path):
    with pytest.raises(UserError, match="^--dry-run: "):
        prepare_data.main(["tokenize", *flags(values), "--dry-run"])
    (tmp_path / "train.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="train.jsonl:1: give exactly one of"):
        prepare_data.main(["tokenize", *flags(values)])
    with pytest.raises(UserError, match="^--tokenizing-workers 0"):
        prepare_data.main(["tokenize", *flags(values), "--tokenizing-workers", "0"])


def test_the_other_actions_are_as_before(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    assert "tokenize" in capsys.readouterr().out
