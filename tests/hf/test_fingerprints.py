"""Fingerprints of models and tokenizers follow what a folder means."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssft.errors import UserError
from megatron_ssft.hf.fingerprints import model_fingerprint, tokenizer_fingerprint
from tests.helpers.hf_folders import edit
from tests.helpers.hf_models import random_model


def test_fingerprints_follow_the_meaning_of_a_folder(tmp_path):
    folder = random_model(tmp_path / "model", "llama", False)
    model, tokenizer = model_fingerprint(folder), tokenizer_fingerprint(folder)
    assert len(model) == len(tokenizer) == 64

    def unchanged():
        return model_fingerprint(folder) == model, tokenizer_fingerprint(folder) == tokenizer

    config = json.loads((folder / "config.json").read_text())
    respelled = dict(reversed(config.items())) | {"transformers_version": "0"}
    respelled["torch_dtype"] = respelled.pop("dtype")
    (folder / "config.json").write_text(json.dumps(respelled, indent=7).replace("512", "512.0"))
    entries = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(dict(reversed(entries.items()))))
    tensors = load_file(folder / "model.safetensors")
    half = {name for name in tensors if "layers.1" in name}
    shards = {"a.safetensors": half, "b.safetensors": set(tensors) - half}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert unchanged() == (True, True)

    edit(folder / "config.json", lambda c: c.update(rms_norm_eps=2e-6))
    assert unchanged() == (False, True)
    edit(folder / "config.json", lambda c: c.update(rms_norm_eps=config["rms_norm_eps"]))
    assert unchanged() == (True, True)
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="x"))
    assert unchanged() == (True, False)
    (bits := tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32))[-1, -1] ^= 1
    save_file({name: tensors[name] for name in half}, folder / "a.safetensors")
    assert unchanged() == (False, False)
    bits[-1, -1] ^= 1
    save_file({name: tensors[name] for name in half}, folder / "a.safetensors")
    assert unchanged() == (True, False)


def test_fingerprints_of_swapped_and_reshaped_tensors_differ(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first, second = torch.arange(6.0), torch.arange(6.0) + 1
    variants = [
        {"a": first, "b": second},
        {"a": second, "b": first},
        {"a": first.view(2, 3), "b": second},
        {"a": first.view(3, 2), "b": second},
        {"a": torch.cat([first, second[:3]]), "b": second[3:]},
        {"a": first.view(torch.bfloat16), "b": second},
        {"a": first.view(torch.float16), "b": second},
        {"a": first, "c": second},
    ]
    found = set()
    for variant in variants:
        save_file(variant, tmp_path / "model.safetensors")
        found.add(model_fingerprint(tmp_path))
    assert len(found) == len(variants)


def test_fingerprints_of_folders_that_are_no_models(tmp_path):
    for fingerprint in (model_fingerprint, tokenizer_fingerprint):
        with pytest.raises(UserError, match=str(tmp_path)):
            fingerprint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        model_fingerprint(tmp_path)
    save_file({"a": torch.arange(60.0)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="no complete safetensors file"):
        model_fingerprint(tmp_path)
