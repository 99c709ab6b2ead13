"""Folders given as --load that hold no model, or say absurd things of one: one line each, before memory is taken."""

from __future__ import annotations

import json

import pytest

from tests.helpers.bad_input import complaint, flags, start_each, write_rows
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model

ABSURD = {
    "layers": {"num_hidden_layers": 10**9},
    "width": {"hidden_size": 10**12},
    "digits": {"hidden_size": 10**200},
    "vocabulary": {"vocab_size": 2**40},
    "heads": {"num_attention_heads": 10**8, "num_key_value_heads": 10**8},
    "mlp": {"intermediate_size": 10**15},
    "negative": {"num_hidden_layers": -4},
    "infinite": {"rms_norm_eps": 1e999},
    "plausible layers": {"num_hidden_layers": 9000},
    "plausible vocabulary": {"vocab_size": 90_000_000},
}
NO_MODEL = {
    "empty": ((), "is empty"),
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), "merge it into its base model"),
    "something else": (("notes.txt",), "neither a run (config.yaml, iter_*) nor a Hugging Face folder (config.json)"),
    "nested": (("config.json",), "cannot be read"),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """Name -> (folder, the line that `train --load` ends with)."""
    root = tmp_path_factory.mktemp("models")
    write_rows(root / "train.jsonl")
    folders = {}
    for name, change in ABSURD.items():
        folders[name] = random_model(root / name, "llama", True)
        config = folders[name] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    for name, (files, _) in NO_MODEL.items():
        folders[name] = root / name
        folders[name].mkdir()
        for file in files:
            (folders[name] / file).write_text("{}" if name == "adapter" else "[" * 100_000)
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "tokenizer_type")
    lines = [without(flags(root, load=folder, seq_length=64), shape) for folder in folders.values()]
    results = run_ranks(1, start_each, lines)[0]
    return {name: (folders[name], complaint(result)) for name, result in zip(folders, results)}


def without(words, names):
    """A command line without these flags and their values."""
    kept = list(words)
    for name in names:
        flag = "--" + name.replace("_", "-")
        if flag in kept:
            place = kept.index(flag)
            del kept[place : place + 2]
    return kept


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_configuration_takes_no_memory(complaints, name):
    folder, line = complaints[name]
    assert line.startswith(f"{folder}/config.json: ") or line.startswith(f"{folder}: "), line
    assert len(line) < 800


@pytest.mark.parametrize("name", NO_MODEL)
def test_a_folder_without_a_model(complaints, name):
    folder, line = complaints[name]
    assert str(folder) in line and NO_MODEL[name][1] in line
