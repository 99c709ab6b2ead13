"""A run says where its weights came from, and its config.yaml starts there again or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_ssft.hf.fingerprints import model_fingerprint
from tests.helpers.bad_input import complaint
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model
from tests.helpers.starts import data_file, metrics_of, start_again, starts

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "tokenizer_type")
LOADED = dict.fromkeys(SHAPE)


def tell(folder):
    """Everything that happens, in one process: (status, stdout, stderr) by name."""
    folder = Path(folder)
    model, run = folder / "model", folder / "loaded"
    first = {
        "random": {"save": folder / "random"},
        "loaded": LOADED | {"load": model, "save": run},
        "finetuned": {"load": folder / "random", "finetune": True, "save": folder / "finetuned"},
    }
    told = starts(folder, first)
    told["resumed"] = start_again(run / "config.yaml", load=run, train_iters=3)
    told["again"] = start_again(run / "config.yaml", save=folder / "again", train_iters=2)
    told["again, dry run"] = start_again(run / "config.yaml", save=folder / "dry", dry_run=True)
    told["random again"] = start_again(folder / "random" / "config.yaml", save=folder / "random again")
    told["finetuned again"] = start_again(folder / "finetuned" / "config.yaml", save=folder / "finetuned again")
    told["forked"] = start_again(None, **fork(folder))
    told["other weights"] = start_again(run / "config.yaml", load=folder / "other", save=folder / "other run")
    # The origins change.
    told["random goes on"] = start_again(folder / "random" / "config.yaml", load=folder / "random", train_iters=3)
    told["of a later checkpoint"] = start_again(folder / "finetuned" / "config.yaml", save=folder / "later")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    told["of changed weights"] = start_again(run / "config.yaml", save=folder / "changed")
    told["of changed weights, dry run"] = start_again(run / "config.yaml", save=folder / "changed", dry_run=True)
    told["of changed weights, named anew"] = start_again(run / "config.yaml", save=folder / "anew", load=model)
    shutil.rmtree(model)
    told["of lost weights"] = start_again(run / "config.yaml", save=folder / "lost")
    told["resumed without them"] = start_again(run / "config.yaml", load=run, train_iters=4)
    return told


def fork(folder):
    """The run goes on in another folder."""
    run = folder / "loaded"
    values = {"load": run, "save": folder / "forked", "data_path": folder / "train.jsonl", "train_iters": 4}
    shared = {"lr": 1e-3, "seed": 1, "seq_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
    return values | shared | {"data_cache_path": folder / "cache", "matching_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    random_model(folder / "model", "llama", True)
    random_model(folder / "other", "llama", True, seed=9)
    data_file(folder / "train.jsonl", [("prompt", f"{i}?", ["one", "two"]) for i in range(6)])
    return folder


@pytest.fixture(scope="module")
def fingerprint(folder):
    return model_fingerprint(folder / "model")


@pytest.fixture(scope="module")
def told(folder, fingerprint):
    (outcome,) = run_ranks(1, tell, str(folder), timeout=400)
    return outcome


def config(folder, run):
    return yaml.safe_load((folder / run / "config.yaml").read_text())


def first_line(told, name):
    status, out, err = told[name]
    assert status == 0, (name, out, err)
    lines = [line for line in out.splitlines() if not line.startswith("tokenizing")]
    return lines[0]


def steps(folder, run):
    return [(row["loss"], row["grad_norm"]) for row in metrics_of(folder / run)]


def test_the_first_line_says_where_the_weights_come_from(told, folder, fingerprint):
    assert first_line(told, "random") == "weights: random, drawn by --seed 1"
    line = first_line(told, "loaded")
    assert line == f"weights: from the Hugging Face folder {folder}/model (fingerprint {fingerprint[:12]})"
    assert first_line(told, "again") == line == first_line(told, "again")
    assert first_line(told, "resumed") == f"weights: resumed from {folder}/loaded/iter_0000002"
    line = first_line(told, "finetuned")
    assert line.startswith(f"weights: from the checkpoint {folder}/random/iter_0000002 (fingerprint ")
    assert first_line(told, "finetuned again") == line


def test_the_configuration_names_the_origin(told, folder, fingerprint):
    assert config(folder, "random")["origin"] is None
    for run in ("loaded", "again", "forked"):
        settings = config(folder, run)
        assert (settings["origin"], settings["origin_fingerprint"]) == (str(folder / "model"), fingerprint), run
        assert settings["load"] is None
    settings = config(folder, "finetuned")
    assert settings["origin"] == str(folder / "random") and settings["finetune"] is False
    settings = config(folder, "other run")
    assert settings["origin"] == str(folder / "other") and settings["origin_fingerprint"] != fingerprint


@pytest.mark.parametrize("name", ["random", "loaded", "finetuned"])
def test_the_configuration_used_again_starts_at_the_same_weights(told, folder, name):
    again = {"random": "random again", "loaded": "again", "finetuned": "finetuned again"}[name]
    assert told[again][0] == 0, told[again]
    assert steps(folder, again)[:2] == steps(folder, name)[:2]
    assert told["again, dry run"][0] == 0
    assert f"weights: from the Hugging Face folder {folder}/model" in told["again, dry run"][1]


@pytest.mark.parametrize(
    ("name", "place", "word"),
    [
        ("of changed weights", "model", "fingerprint"),
        ("of changed weights, dry run", "model", "fingerprint"),
        ("of a later checkpoint", "random", "fingerprint"),
        ("of lost weights", "model", "no such folder"),
    ],
)
def test_an_origin_that_is_another_is_refused(told, folder, name, place, word):
    line = complaint(told[name])
    assert line.startswith(f"--origin {folder}/{place}: ") and word in line and "--load" in line
    assert not list(folder.glob("changed/iter_*")) and not list(folder.glob("lost/iter_*"))


def test_weights_named_anew_are_taken(told):
    assert told["of changed weights, named anew"][0] == 0, told["of changed weights, named anew"]


def test_a_run_goes_on_without_its_origin(told, folder):
    assert told["resumed without them"][0] == 0, told["resumed without them"]
    assert config(folder, "loaded")["origin"] == str(folder / "model")


def from_another_place(folder):
    """A run of relative paths, and its configuration used in another working directory."""
    from tests.helpers.bad_input import flags

    folder = Path(folder)
    words = flags(folder, data_path="train.jsonl", data_cache_path="cache", save="runs/here", train_iters=2)
    values = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2])}
    first = start_again(None, cwd=folder, **values)
    (folder / "elsewhere").mkdir()
    return first, start_again(folder / "runs/here/config.yaml", cwd=folder / "elsewhere", load=folder / "runs/here",
                              train_iters=3)  # fmt: skip


def test_relative_paths_are_resolved(folder):
    first, second = run_ranks(1, from_another_place, str(folder))[0]
    assert first[0] == 0, first
    assert second[0] == 0, second
    settings = config(folder, "runs/here")
    assert settings["data_path"] == [str(folder / "train.jsonl")] and settings["save"] == str(folder / "runs/here")
    assert settings["data_cache_path"] == str(folder / "cache") and not any((folder / "elsewhere").iterdir())
    assert len(metrics_of(folder / "runs/here")) == 3


def import_and_train(folder, source):
    """An imported run's configuration, used without --load."""
    from tests.helpers.conversions import import_hf

    folder = Path(folder)
    import_hf(source, folder / "imported", {"num_forking_tokens": 4, "no_verify": True})
    flags = {"data_path": folder / "train.jsonl", "data_cache_path": folder / "cache", "seq_length": 64, "lr": 1e-3}
    flags |= {"train_iters": 1, "global_batch_size": 8, "save": folder / "of import"}
    return start_again(folder / "imported" / "config.yaml", **flags)


def test_an_import_names_its_origin_too(folder):
    source = folder / "other"
    result = run_ranks(1, import_and_train, str(folder), str(source))[0]
    line = first_line({"import": result}, "import")
    assert line.startswith(f"weights: from the Hugging Face folder {source} (fingerprint ")
    assert config(folder, "imported")["origin_fingerprint"] == model_fingerprint(source)
