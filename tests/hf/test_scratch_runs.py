"""Runs from random weights: exported, imported again, trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.hf.fingerprints import model_fingerprint
from megatron_ssft.tokenizers.exported_tags import read_forking_tokens
from megatron_ssft.training import conversion
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.hf_folders import files
from tests.helpers.hf_models import random_model
from tests.helpers.scratch_folders import DEMO, FAMILY, TEXT, TP2PP2
from tests.helpers.training_runs import make_rows, write_rows


def train(values):
    """A run to its end by the trainer's own loop."""
    from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
    from megatron_ssft.signals import StopSignal
    from megatron_ssft.training.startup import complete_values
    from megatron_ssft.training.trainer import Trainer

    config = build_config(complete_values(values), SSFTConfig)
    Trainer(config, initialize_topology(config.run)).run(StopSignal())
    destroy_topology()


def export_run(source, target, options):
    conversion.export_run(Path(source), Path(target), dict(options))


def import_hf(source, target, options):
    conversion.import_hf(Path(source), Path(target), dict(options))


def run_values(tmp_path, **values):
    return {
        **DEMO,
        "data_path": [write_rows(tmp_path / "train.jsonl", make_rows(max_traces=3))],
        "data_cache_path": str(tmp_path / "cache"),
        "save": str(tmp_path / "run"),
        "tokenizer_type": "CharTokenizer",
        "seq_length": 64,
        "matching_tokens": 8,
        "global_batch_size": 6,
        "train_iters": 2,
        "lr": 1e-2,
        **values,
    }


def weights_of(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_export(first, second):
    one, other = files(first), files(second)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "values"),
    [
        (1, {}),
        (1, FAMILY["mistral"] | {"untie_embeddings_and_output_weights": True, "bf16": True} | TEXT),
        (2, {"num_query_groups": 2, "qk_layernorm": True, "kv_channels": 24, "tensor_model_parallel_size": 2}),
        (4, {"num_layers": 4, "num_query_groups": 2} | TP2PP2),
    ],
)
def test_a_run_from_random_weights_is_exported_and_comes_back(tmp_path, ranks, values):
    """While training and by the tool, verified both times; the export goes through a run and out again unchanged."""
    values = run_values(tmp_path, export_hf_at_save=True, **values)
    run_ranks(ranks, train, values)
    at_save = tmp_path / "run" / "iter_0000002" / "hf"
    run_ranks(1, export_run, str(tmp_path / "run"), str(tmp_path / "hf"), {})
    assert_same_export(at_save, tmp_path / "hf")
    tags = read_forking_tokens(tmp_path / "hf")
    format = values.get("forking_token_format", "special")
    assert (tags.num_tags, tags.format) == (6, format)
    options = {"num_forking_tokens": 6, "forking_token_format": format}
    run_ranks(1, import_hf, str(tmp_path / "hf"), str(tmp_path / "again"), options)
    run_ranks(1, export_run, str(tmp_path / "again"), str(tmp_path / "hf2"), {})
    assert_same_export(tmp_path / "hf", tmp_path / "hf2")
    run_ranks(1, import_hf, str(tmp_path / "hf"), str(tmp_path / "untagged"), {})  # its file of tags stays with it
    run_ranks(1, export_run, str(tmp_path / "untagged"), str(tmp_path / "hf3"), {})
    assert_same_export(tmp_path / "hf", tmp_path / "hf3")
    assert model_fingerprint(tmp_path / "hf") == model_fingerprint(at_save)


@pytest.mark.slow
def test_a_run_that_has_no_files_yet_is_exported_all_the_same(tmp_path):
    run_ranks(1, train, run_values(tmp_path))
    run_ranks(1, export_run, str(tmp_path / "run"), str(tmp_path / "hf"), {})
    shutil.rmtree(tmp_path / "run" / "hf")
    run_ranks(2, export_run, str(tmp_path / "run"), str(tmp_path / "hf2"), {"tensor_model_parallel_size": 2})
    assert_same_export(tmp_path / "hf", tmp_path / "hf2")
    assert not (tmp_path / "run" / "hf").exists()
    run_ranks(1, train, run_values(tmp_path, load=str(tmp_path / "run"), train_iters=3, export_hf_at_save=True))
    exported = tmp_path / "run" / "iter_0000003" / "hf"
    assert (exported / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert (exported / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_model_of_no_family_trains_but_is_not_exported(tmp_path):
    values = run_values(tmp_path, rotary_percent=0.5)
    with pytest.raises(RankFailure, match="UserError: --export-hf-at-save: none of .* has --rotary-percent 0.5"):
        run_ranks(1, train, values | {"export_hf_at_save": True})
    assert not list((tmp_path / "run").glob("iter_*"))
    run_ranks(1, train, values)
    assert not (tmp_path / "run" / "hf").exists()
    with pytest.raises(RankFailure, match="UserError: .*run: cannot be exported: none of .* has --rotary-percent 0.5"):
        run_ranks(1, export_run, str(tmp_path / "run"), str(tmp_path / "hf"), {})
    assert not (tmp_path / "hf").exists()


def test_files_of_an_earlier_start_do_not_stay(tmp_path):
    from megatron_ssft.training.resume import keep_assets

    def keep(**values):
        keep_assets(build_config(run_values(tmp_path, **values), SSFTConfig))
        path = tmp_path / "run" / "hf" / "config.json"
        return json.loads(path.read_text()) if path.is_file() else None

    assert keep()["num_hidden_layers"] == 3
    assert keep(num_layers=4, seq_length=80)["max_position_embeddings"] == 80
    assert keep(swiglu=False) is None
    source = random_model(tmp_path / "model", "llama", True)
    assert keep(load=str(source))["vocab_size"] == 301
    assert keep()["vocab_size"] == 263
    with pytest.raises(UserError, match="--export-hf-at-save: none of .* has --no-swiglu"):
        keep(swiglu=False, export_hf_at_save=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["hf"]


def test_a_tokenizer_that_the_family_reads_otherwise_is_refused_for_an_export(tmp_path):
    """transformers 5 gives every qwen2 model the rules of Qwen2's own tokenizer, which joins accents to letters."""
    from transformers import AutoTokenizer

    from megatron_ssft.training.resume import keep_assets

    values = run_values(tmp_path, add_qkv_bias=True)
    keep_assets(build_config(values, SSFTConfig))
    if AutoTokenizer.from_pretrained(tmp_path / "run" / "hf").backend_tokenizer.normalizer is None:
        pytest.skip("this version of transformers reads the folder as it stands")
    with pytest.raises(UserError, match="^--export-hf-at-save: transformers reads the tokenizer of a qwen2 model"):
        keep_assets(build_config(values | {"export_hf_at_save": True}, SSFTConfig))
