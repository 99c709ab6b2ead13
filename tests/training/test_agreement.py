"""Ranks that were started differently are refused before anything is trained, and what differs is named."""

from __future__ import annotations

import os

import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.training import agreement
from tests.helpers.captured import run_captured
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows


def test_facts_name_every_setting_and_the_code():
    config = build_config(BASE | {"data_path": ["train.jsonl"]}, SSFTConfig)
    facts = agreement.facts_of(config)
    assert facts["--lr"] == "0.01" and facts["--data-path"] == "['train.jsonl']"
    assert facts["megatron_ssft/training/agreement.py"].startswith("sha256 ")
    assert facts["torch"] != "absent" and facts["Python"].startswith("3.")
    other = agreement.facts_of(build_config(BASE | {"data_path": ["train.jsonl"], "lr": 0.02}, SSFTConfig))
    assert {key for key in facts if facts[key] != other[key]} == {"--lr"}


def test_facts_tell_another_version_of_the_code(tmp_path, monkeypatch):
    package = tmp_path / "megatron_ssft"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "loss.py").write_text("x = 1\n")
    monkeypatch.setattr(agreement.megatron_ssft, "__file__", str(package / "__init__.py"))
    before = agreement.installed()
    (package / "loss.py").write_text("x = 2\n")
    after = agreement.installed()
    assert {key for key in before if before[key] != after[key]} == {"megatron_ssft/loss.py"}


def start_differently(common, by_rank):
    """(status, stdout, stderr) of `train` with flags of each rank's own."""
    from megatron_ssft.cli import train
    from megatron_ssft.cli.entry import run_command

    changes, version = by_rank[int(os.environ["RANK"])]
    if version is not None:
        real = agreement._version
        agreement._version = lambda name: version if name == "lap" else real(name)
    return run_captured(lambda: run_command(lambda: train.main(flags(common | changes))))


DIFFERENCES = {
    "learning rate": ([({"lr": 1e-3}, None), ({"lr": 0.1}, None)], "--lr: 0.001 on rank 0 (", "0.1 on rank 1 ("),
    "parallel layout": (
        [({"tensor_model_parallel_size": 2}, None), ({"pipeline_model_parallel_size": 2}, None)],
        "--tensor-model-parallel-size: 2 on rank 0 (",
        "--pipeline-model-parallel-size: 1 on rank 0 (",
    ),
    "a library": (
        [({}, None), ({}, None), ({}, "0.1.0"), ({}, None)],
        "lap: ",
        "on ranks 0-1, 3 (",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_do_not_train(name, tmp_path):
    by_rank, *inside = DIFFERENCES[name]
    common = BASE | {
        "data_path": write_rows(tmp_path / "train.jsonl", make_rows()),
        "data_cache_path": str(tmp_path / "cache"),
        "save": str(tmp_path / "run"),
    }
    results = run_ranks(len(by_rank), start_differently, common, by_rank)
    assert [status for status, _, _ in results] == [2] * len(by_rank), results
    assert [err.count("\n") for _, _, err in results] == [1] + [0] * (len(by_rank) - 1)
    for text in inside:
        assert text in results[0][2]
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
