"""Sequences longer than the model was made for: refused unless asked for, and then the export says so."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from tests.helpers.bad_input import complaint
from tests.helpers.conversions import export_run
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model
from tests.helpers.policy_files import MODEL
from tests.helpers.starts import data_file, starts

POSITIONS = 48
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "tokenizer_type")


def positions(folder):
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def cases(folder):
    loaded = dict.fromkeys(SHAPE) | {"load": folder / "model", "train_iters": 1}
    exported = {"export_hf_at_save": True, "no_verify_hf": True}
    scratch = {"train_iters": 1, "seq_length": 40}
    again = scratch | {"load": folder / "scratch", "finetune": True, "seq_length": 56}
    return {
        "longer": loaded | {"save": folder / "longer"},
        "longer, dry run": loaded | {"dry_run": True},
        "just as long": loaded | exported | {"seq_length": POSITIONS, "save": folder / "equal"},
        "asked for": loaded | exported | {"max_position_embeddings": 72, "save": folder / "asked"},
        "asked for too little": loaded | {"max_position_embeddings": 63},
        "resumed": loaded | {"load": folder / "asked", "save": folder / "asked"},
        "scratch": scratch | {"save": folder / "scratch"},
        "scratch, for more": scratch | exported | {"save": folder / "more", "max_position_embeddings": 100},
        "run, longer": again | {"save": folder / "again refused"},
        "run, asked for": again | {"save": folder / "again", "max_position_embeddings": 56},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    random_model(folder / "model", "llama", True, max_position_embeddings=POSITIONS)
    data_file(folder / "train.jsonl", [("prompt", f"{i}?", ["one", "two"]) for i in range(6)])
    return folder


@pytest.fixture(scope="module")
def results(folder):
    (outcome,) = run_ranks(1, starts, folder, cases(folder), timeout=240)
    return outcome


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("longer", POSITIONS),
        ("longer, dry run", POSITIONS),
        ("asked for too little", 63),
        ("run, longer", 40),
    ],
)
def test_longer_than_the_model_is_refused(results, folder, name, limit):
    line = complaint(results[name])
    assert line.startswith("--seq-length") and f" {limit}" in line and "--max-position-embeddings" in line
    assert not list((folder / "longer").glob("iter_*")) and not list((folder / "again refused").glob("iter_*"))


@pytest.mark.parametrize(
    ("name", "run", "expected"),
    [
        ("just as long", "equal", POSITIONS),
        ("asked for", "asked", 72),
        ("scratch, for more", "more", 100),
    ],
)
def test_the_export_says_what_the_model_is_used_for(results, folder, name, run, expected):
    assert results[name][0] == 0, results[name]
    assert positions(folder / run / "iter_0000001" / "hf") == expected == positions(folder / run / "hf")


def test_a_later_run_keeps_the_length(results, folder):
    assert results["resumed"][0] == 0, results["resumed"]  # at the length that the first start asked for
    assert positions(folder / "asked" / "hf") == 72
    assert results["run, asked for"][0] == 0, results["run, asked for"]
    assert positions(folder / "again" / "hf") == 56 and positions(folder / "scratch" / "hf") == 40


@pytest.mark.slow
def test_a_conversion_carries_the_length(results, folder, tmp_path):
    assert results["asked for"][0] == 0
    run_ranks(1, export_run, str(folder / "asked"), str(tmp_path / "hf"), {"no_verify": True})
    assert positions(tmp_path / "hf") == 72


def test_policy_learning_has_the_same_limit():
    values = MODEL | {"data": "Q", "rewards": "R", "save": "S", "train_iters": 1, "seq_length": 64}
    build_config(values | {"max_position_embeddings": 64}, GFPOConfig)
    with pytest.raises(UserError, match="^--seq-length 64: .* 63"):
        build_config(values | {"max_position_embeddings": 63}, GFPOConfig)
