"""An export stops at the token that training ends every trace with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssft.generation.hf_backend import HFBackend
from megatron_ssft.generation.model_folder import TagFlags, open_model_folder
from megatron_ssft.generation.requests import Request, Sampling
from megatron_ssft.hf.assets import write_assets
from tests.helpers.conversions import export_run, import_hf
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_folders import CONFIG, checkpoint, edit
from tests.helpers.hf_models import CHATML, chatml_tokenizer, random_model
from tests.helpers.starts import data_file, starts

END, TEXT_END = 2, 0  # <|im_end|> and <|endoftext|>
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "tokenizer_type")


def exported(tmp_path, config, generation):
    """(config.json, generation_config.json) of an export of a folder that had these ends; None: no key, no file."""
    source = checkpoint(tmp_path / "in")
    edit(source / "config.json", lambda c: c.pop("eos_token_id"))
    if config is not None:
        edit(source / "config.json", lambda c: c.update(eos_token_id=json.loads(config)))
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(generation)
    write_assets(source, tmp_path / "out", None, 290, "float32", end_id=END)
    file = tmp_path / "out" / "generation_config.json"
    return (
        json.loads((tmp_path / "out" / "config.json").read_text()),
        json.loads(file.read_text()) if file.is_file() else None,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [("2", 2), ("0", [2, 0]), ("[0, 1]", [2, 0, 1]), ("[0, 2]", [0, 2]), ("null", 2), ("[]", 2)],
)
def test_the_trained_end_is_added_and_the_others_stay(tmp_path, before, after):
    config, generation = exported(tmp_path, before, f'{{"eos_token_id": {before}, "top_p": 0.9}}')
    assert config["eos_token_id"] == after == generation["eos_token_id"]
    assert generation == {"eos_token_id": after, "top_p": 0.9}
    assert {**config, "eos_token_id": 2} == CONFIG


def test_files_without_an_end_get_one(tmp_path):
    config, generation = exported(tmp_path, None, '{"do_sample": false}')
    assert config["eos_token_id"] == 2 and generation == {"do_sample": False, "eos_token_id": 2}
    config, generation = exported(tmp_path / "more", "1", None)
    assert config["eos_token_id"] == [2, 1] and generation is None  # transformers takes it from config.json then


def ends_at_once(folder, **changes):
    """A model whose every next token is <|im_end|>, in a folder that says it ends with <|endoftext|>."""
    random_model(folder, "llama", False, eos_token_id=TEXT_END, **changes)
    tensors = load_file(folder / "model.safetensors")
    common = torch.ones(tensors["model.embed_tokens.weight"].shape[1])
    tensors["model.embed_tokens.weight"] += 300 * common
    tensors["lm_head.weight"][END] = 10 * common / tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": TEXT_END, "do_sample": False}))
    return folder


def generated(folder):
    """What transformers writes, and what the project's own backend does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("Question 1", return_tensors="pt")
    theirs = model.generate(**prompt, max_new_tokens=6)[0, prompt["input_ids"].shape[1] :].tolist()
    ids = tuple(prompt["input_ids"][0].tolist())
    stop_ids = open_model_folder(Path(folder), TagFlags()).stop_ids
    backend = HFBackend(Path(folder), Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=6), stop_ids)
    (ours,) = backend.generate([Request("q", prompt=ids, start=(), slot=None, sample=0, seed=1, limit=6)])
    return theirs, list(ours.token_ids or ()), ours.finish_reason


def test_generation_of_an_export_ends_where_training_ended(tmp_path):
    source = ends_at_once(tmp_path / "model")
    run_ranks(1, import_hf, str(source), str(tmp_path / "m"), {"num_forking_tokens": 3, "no_verify": True})
    run_ranks(1, export_run, str(tmp_path / "m"), str(tmp_path / "hf"), {"no_verify": True})
    theirs, ours, reason = run_ranks(1, generated, str(tmp_path / "hf"))[0]
    assert theirs == ours == [END] and reason == "stop"


def test_another_tokenizer_than_the_model_came_with_goes_into_the_export(tmp_path):
    """A base model trained with the tokenizer of its chat model: another end of turn, and a template."""
    base = ends_at_once(tmp_path / "base")
    edit(base / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>", chat_template=None))
    chatml_tokenizer(tmp_path / "chat")
    data_file(tmp_path / "train.jsonl", [("question", f"{i}?", ["one", "two"]) for i in range(6)])
    changes = dict.fromkeys(SHAPE) | {"load": base, "tokenizer_type": "HuggingFaceTokenizer", "train_iters": 1}
    changes |= {"tokenizer_model": tmp_path / "chat", "save": tmp_path / "run", "export_hf_at_save": True, "lr": 1e-9}
    (results,) = run_ranks(1, starts, tmp_path, {"run": changes})
    assert results["run"][0] == 0, results["run"]
    export = tmp_path / "run" / "iter_0000001" / "hf"
    settings = json.loads((export / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["chat_template"] == CHATML
    theirs, ours, reason = run_ranks(1, generated, str(export))[0]
    assert theirs == ours == [END] and reason == "stop"
