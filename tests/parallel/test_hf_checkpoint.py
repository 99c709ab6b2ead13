"""Hugging Face folders in and out: bitwise round trips, logits, and faults that must be noticed."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssft.hf import tensor_map
from megatron_ssft.parallel.checkpoint import hf as hf_checkpoint
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.topology import destroy_topology
from megatron_ssft.training import conversion
from tests.helpers.conversions import export_run, import_hf, verify, weights_of
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.hf_models import random_model
from tests.helpers.training_runs import make_rows, write_rows

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
MODELS = [
    ("LlamaForCausalLM", True),
    ("LlamaForCausalLM", False),
    ("MistralForCausalLM", False),
    ("Qwen2ForCausalLM", True),
    ("Qwen2ForCausalLM", False),
    ("Qwen3ForCausalLM", True),
    ("Qwen3ForCausalLM", False),
]
LAYOUTS = {"one": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2), "tp2pp2": (4, TP2 | PP2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models by (architecture, tied), made once."""
    made = {}

    def model(architecture, tied):
        if (architecture, tied) not in made:
            folder = tmp_path_factory.mktemp("model") / architecture
            random_model(folder, architecture.removesuffix("ForCausalLM").lower(), tied)
            made[architecture, tied] = folder
        return made[architecture, tied]

    return model


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_round_trip_is_bitwise_and_verified(models, tmp_path, architecture, tied, layout):
    """In at one layout, out at another; both commands end with their own proof."""
    source = models(architecture, tied)
    ranks, flags = LAYOUTS[layout]
    other_ranks, other_flags = LAYOUTS["one" if layout != "one" else "tp2"]
    run_ranks(ranks, import_hf, str(source), str(tmp_path / "megatron"), flags)
    run_ranks(other_ranks, export_run, str(tmp_path / "megatron"), str(tmp_path / "hf"), other_flags)
    before, after = weights_of(source), weights_of(tmp_path / "hf")
    before.pop("lm_head.weight", None) if tied else None
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name]), name
    config, exported = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "hf"))
    assert config["vocab_size"] == exported["vocab_size"]
    assert run_ranks(ranks, verify, str(tmp_path / "hf"), str(tmp_path / "megatron"), flags) == [None] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_added_tags_reach_the_export(models, tmp_path, tied):
    source = models("Qwen2ForCausalLM", tied)
    run_ranks(2, import_hf, str(source), str(tmp_path / "m"), TP2 | {"num_forking_tokens": 5})
    run_ranks(2, export_run, str(tmp_path / "m"), str(tmp_path / "hf"), PP2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = [tokenizer.encode(f"<think{i}>", add_special_tokens=False) for i in range(1, 6)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 5
    assert tokenizer.decode([i[0] for i in ids], skip_special_tokens=True).count("<think") == 5
    before, after = weights_of(source), weights_of(tmp_path / "hf")
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        rows = after[name]
        assert len(rows) == max(len(before[name]), max(i[0] for i in ids) + 1)
        new = {i[0] for i in ids}
        kept = [i for i in range(len(before[name])) if i not in new]
        assert torch.equal(rows[kept], before[name][kept])
        assert len(rows[sorted(new)].unique(dim=0)) == 5
        assert rows[sorted(new)].float().std() > 0


# -- faults ----------------------------------------------------------------------------------------------------------


def tamper(folder, target, fault):
    """Load a Megatron folder, damage one weight as a wrong conversion would, save it as another run."""
    config, topology, vocabulary, engine = conversion._start(Path(folder), {})
    conversion._load(engine, Path(folder))
    (chunk,) = engine.chunks
    layer = chunk.decoder.layers[1]
    with torch.no_grad():
        if fault == "bias dropped":
            layer.self_attention.linear_qkv.bias.zero_()
        elif fault == "gate and up swapped":
            weight = layer.mlp.linear_fc1.weight
            weight.copy_(torch.cat(weight.chunk(2)[::-1]))
        elif fault == "QKV group shifted":
            weight = layer.self_attention.linear_qkv.weight
            weight.copy_(weight.roll(len(weight) // 2, 0))
        elif fault == "embedding untied":
            chunk.embedding.word_embeddings.weight[7] += 1.0
    save_checkpoint(engine, Path(target), 0, conversion.weights_state(config.run, vocabulary))
    conversion._write_config(Path(target), config.run)
    destroy_topology()


@pytest.mark.parametrize(
    "fault", ["none", "bias dropped", "gate and up swapped", "QKV group shifted", "embedding untied"]
)
def test_verify_notices_planted_faults(models, tmp_path, fault):
    source = models("Qwen2ForCausalLM", True)
    run_ranks(1, import_hf, str(source), str(tmp_path / "m"), {"no_verify": True})
    shutil.copytree(tmp_path / "m" / "hf", tmp_path / "bad" / "hf")
    run_ranks(1, tamper, str(tmp_path / "m"), str(tmp_path / "bad"), fault)
    (refusal,) = run_ranks(1, verify, str(source), str(tmp_path / "bad"), {})
    assert (refusal is None) == (fault == "none"), refusal


def import_with_a_wrong_table(source, target, mistake):
    """An import whose table of tensors has a mistake: reading and comparing agree, only the logits can tell."""
    real_sources = tensor_map.sources

    def wrong(key, layer, model, rows):
        found = real_sources(key, layer, model, rows)
        if mistake == "gate and up" and key.endswith("linear_fc1.weight"):
            swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            return [(n.replace(w, swap[w]), r, s) for n, r, s in found for w in swap if w in n]
        if mistake == "keys and values" and key.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            swap = {"k_proj": "v_proj", "v_proj": "k_proj", "q_proj": "q_proj"}
            return [(n.replace(w, swap[w]), r, s) for n, r, s in found for w in swap if w in n]
        if mistake == "norms" and key.endswith("layer_norm_weight"):
            swap = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
            return [(n.replace(w, swap[w]), r, s) for n, r, s in found for w in swap if w in n]
        return found

    hf_checkpoint.sources = wrong
    conversion.import_hf(Path(source), Path(target), {})


@pytest.mark.parametrize("mistake", ["none", "gate and up", "keys and values", "norms"])
def test_logits_notice_a_wrong_table(models, tmp_path, mistake):
    source = models("Qwen2ForCausalLM", False)
    if mistake == "none":
        run_ranks(1, import_with_a_wrong_table, str(source), str(tmp_path / "m"), mistake)
    else:
        with pytest.raises(RankFailure, match="not the same model as the Megatron weights: logits of"):
            run_ranks(1, import_with_a_wrong_table, str(source), str(tmp_path / "m"), mistake)


def test_tied_model_with_a_head_of_its_own_is_refused(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models("LlamaForCausalLM", True), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankFailure, match="lm_head.weight"):
        run_ranks(1, import_hf, str(folder), str(tmp_path / "m"), {})
    assert not (tmp_path / "m" / "iter_0000000").exists()


def import_cut_to_two_layers(source, target):
    from megatron_ssft.parallel.checkpoint import hf_verification

    hf_verification._layers_that_fit = lambda config: 2
    with contextlib.redirect_stdout(io.StringIO()) as output:
        conversion.import_hf(Path(source), Path(target), {})
    return output.getvalue()


def test_large_models_are_verified_by_their_first_layers(models, tmp_path):
    source = str(models("LlamaForCausalLM", False))
    (output,) = run_ranks(1, import_cut_to_two_layers, source, str(tmp_path / "m"))
    assert "verified: logits of" in output and "first 2 of 4 layers" in output


# -- what a start and a failed command leave behind ----------------------------------------------------------------


def import_damaged_on_the_way(source, target):
    """One weight goes wrong on its way to the disk, not in memory; the logits are compared on a cut stack only."""
    from megatron_ssft.parallel.checkpoint import hf_verification

    hf_verification._layers_that_fit = lambda config: 2
    real = conversion.save_checkpoint

    def save(engine, *arguments):
        weight = engine.chunks[0].decoder.layers[3].mlp.linear_fc2.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            folder = real(engine, *arguments)
            weight.copy_(kept)
        return folder

    conversion.save_checkpoint = save
    conversion.import_hf(Path(source), Path(target), {})


def test_an_import_that_is_not_the_model_is_not_left_behind(models, tmp_path):
    with pytest.raises(RankFailure, match="layers.3.mlp.down_proj.weight differs from the Megatron weights"):
        run_ranks(1, import_damaged_on_the_way, str(models("LlamaForCausalLM", True)), str(tmp_path / "m"))
    assert not list((tmp_path / "m").glob("iter_*"))
    assert not (tmp_path / "m" / "latest_checkpointed_iteration.txt").exists()
    run_ranks(1, import_hf, str(models("LlamaForCausalLM", True)), str(tmp_path / "m"), {})


def test_a_moved_run_still_exports(models, tmp_path):
    run_ranks(1, import_hf, str(models("Qwen2ForCausalLM", True)), str(tmp_path / "m"), {"num_forking_tokens": 3})
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    run_ranks(1, export_run, str(tmp_path / "elsewhere"), str(tmp_path / "hf"), {})
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def train(values):
    """Losses and gaps of a run by the trainer's own entry."""
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.parallel.topology import initialize_topology
    from megatron_ssft.training.startup import complete_values
    from megatron_ssft.training.trainer import Trainer

    config = build_config(complete_values(values), SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    rows = [trainer.train_step()[1] for _ in range(config.run.training.train_iters)]
    return [(row["loss"], row["matching_gap"]) for row in rows]


def training_values(tmp_path, load):
    return {
        "load": str(load),
        "data_path": [write_rows(tmp_path / "train.jsonl", make_rows(max_traces=3))],
        "data_cache_path": str(tmp_path / "cache"),
        "save": str(tmp_path / "run"),
        "seq_length": 128,
        "num_forking_tokens": 3,
        "matching_tokens": 8,
        "global_batch_size": 6,
        "train_iters": 2,
    }


def test_tags_without_rows_get_some(models, tmp_path):
    """A tokenizer that knows the tags beside a model that was never resized for them."""
    source = tmp_path / "model"
    random_model(source, "llama", True, vocab_size=290)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for i in range(3):
        tokenizer["added_tokens"].append(
            {"id": 290 + i, "content": f"<think{i + 1}>", "special": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    ((first, second),) = run_ranks(1, train, training_values(tmp_path, source))
    assert min(first[1], second[1]) > 1e-3
    run_ranks(1, import_hf, str(source), str(tmp_path / "m"), {"num_forking_tokens": 3})


def test_assets_are_those_of_the_model_that_is_loaded(models, tmp_path):
    """A start that was refused leaves nothing that a later one from another model would export."""
    first, second = models("Qwen2ForCausalLM", True), tmp_path / "instruct"
    shutil.copytree(first, second)
    (second / "generation_config.json").write_text('{"eos_token_id": [2]}')
    values = training_values(tmp_path, first)
    with pytest.raises(RankFailure, match="No such file|cannot|not"):
        run_ranks(1, train, values | {"data_path": [str(tmp_path / "absent.jsonl")]})
    run_ranks(1, train, values | {"load": str(first)})
    run_ranks(1, train, values | {"load": str(second)})
    assert json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text()) == {"eos_token_id": [2]}


def test_imported_without_tags_cannot_be_trained(models, tmp_path):
    run_ranks(1, import_hf, str(models("Qwen2ForCausalLM", True)), str(tmp_path / "m"), {})
    with pytest.raises(RankFailure, match="imported without tags; import it again with --num-forking-tokens"):
        run_ranks(1, train, training_values(tmp_path, tmp_path / "m"))
