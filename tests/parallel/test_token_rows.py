"""A tokenizer that knows more tokens than the model has rows: they begin as tags do, and the log says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.conversions import export_run, import_hf, weights_of
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model
from tests.helpers.starts import starts
from tests.helpers.training_runs import write_rows

ROWS, ENTRIES = 290, 302
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "tokenizer_type")


def add_tokens(folder, number=ENTRIES - ROWS):
    """Entries of the tokenizer beyond the table: <extra_0>, <extra_1>, ..."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": ROWS + i, "content": f"<extra_{i}>", **flags} for i in range(number)]
    path.write_text(json.dumps(tokenizer))
    return folder


def rows_of(folder):
    return [{"id": f"q{i}", "question": f"<extra_{i}>{i}?", "traces": [{"text": f"a<extra_{i + 4}>{i}"}, {"text": "b"}]}
            for i in range(6)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, tied in (("tied", True), ("untied", False)):
        add_tokens(random_model(folder / name, "llama", tied, vocab_size=ROWS))
        random_model(folder / f"{name} enough", "llama", tied, vocab_size=ENTRIES)
    add_tokens(folder / "tied enough")
    write_rows(folder / "train.jsonl", rows_of(folder))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    without_shape = dict.fromkeys(SHAPE)
    common = without_shape | {"seq_length": 64, "train_iters": 1, "lr": 1e-9, "export_hf_at_save": True}
    cases = {
        name: common | {"load": folder / name, "save": folder / f"run {name}"}
        for name in ("tied", "untied", "tied enough")
    }
    cases["untied"] = cases["untied"] | {"no_verify_hf": True}
    cases["tied enough"] = cases["tied enough"] | {"export_hf_at_save": None}
    (outcome,) = run_ranks(1, starts, folder, cases, timeout=240)
    again = common | {
        "load": folder / "run tied",
        "save": folder / "run tied",
        "train_iters": 2,
        "export_hf_at_save": None,
    }
    (resumed,) = run_ranks(1, starts, folder, {"resumed": again})
    return outcome | resumed


def check_rows(before, after, name):
    """The model's rows are as they were; the new ones are like them, and different from each other."""
    table, old = after[name], before[name]
    assert torch.allclose(table[:ROWS], old, atol=1e-6)
    new = table[ROWS:ENTRIES]
    assert len(new.unique(dim=0)) == ENTRIES - ROWS
    rms = old.square().mean().sqrt()
    for row in new:
        assert 0.5 < row.square().mean().sqrt() / rms < 2


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_tokens_without_a_row_begin_as_tags_do(results, folder, name):
    assert results[name][0] == 0, results[name]
    before, after = weights_of(folder / name), weights_of(folder / f"run {name}" / "iter_0000001" / "hf")
    check_rows(before, after, "model.embed_tokens.weight")
    if name == "untied":
        check_rows(before, after, "lm_head.weight")


def test_the_log_says_how_many(results):
    for name in ("tied", "untied"):
        line = re.search(r"^12 of 302 tokens .*$", results[name][1], re.M)
        assert line and "290" in line[0] and "row" in line[0]
    assert not re.search(r"tokens .* row", results["tied enough"][1])
    assert results["resumed"][0] == 0 and not re.search(r"tokens .* row", results["resumed"][1])  # they have rows now


@pytest.mark.slow
def test_ranks_agree_on_the_rows(results, folder, tmp_path):
    """Each rank of a tensor-parallel import draws its part of the same rows."""
    run_ranks(2, import_hf, str(folder / "untied"), str(tmp_path / "m"), {"tensor_model_parallel_size": 2})
    run_ranks(1, export_run, str(tmp_path / "m"), str(tmp_path / "hf"), {})
    alone = weights_of(folder / "run untied" / "iter_0000001" / "hf")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        whole = weights_of(tmp_path / "hf")[name]
        check_rows(weights_of(folder / "untied"), {name: whole}, name)
        assert torch.allclose(whole[ROWS:ENTRIES].float().std(), alone[name][ROWS:ENTRIES].std(), rtol=0.2)
    assert not list(Path(tmp_path).glob("*.partial"))
