"""Flags, files and defaults: what wins, and what --help and --dry-run promise."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.fields import field_docstrings
from megatron_ssft.config.flags import build_config, build_parser, flat, parse_arguments, sections_of, to_yaml
from tests.helpers.config_flags import BASE, argv, from_file, parse
from tests.helpers.paths import ROOT

SECTIONS = sections_of(SSFTConfig)
FIELDS = [(section, field) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]

# -- what wins -------------------------------------------------------------------------------------------------------


def test_flag_beats_file_and_file_beats_default(tmp_path):
    text = yaml.safe_dump({name.replace("-", "_"): value for name, value in BASE.items()})
    assert from_file(tmp_path, text).run.training.lr == 1e-5
    assert from_file(tmp_path, text + "lr: 0.25\n").run.training.lr == 0.25
    assert from_file(tmp_path, text + "lr: 0.25\n", "--lr", "0.5").run.training.lr == 0.5


def test_flag_at_its_default_value_still_beats_the_file(tmp_path):
    text = yaml.safe_dump(BASE) + "swiglu: false\nseed: 7\nforking-token-lr-mult: 30\n"
    config = from_file(tmp_path, text, "--swiglu", "--seed", "1234", "--forking-token-lr-mult", "1.0")
    assert (config.run.model.swiglu, config.run.training.seed, config.run.forking.forking_token_lr_mult) == (
        True,
        1234,
        1.0,
    )
    assert from_file(tmp_path, text, "--no-add-bias-linear").run.model.swiglu is False


@pytest.mark.parametrize("stored", ["train_iters", "train_epochs"])
@pytest.mark.parametrize("given", ["train_iters", "train_epochs"])
def test_length_on_the_command_line_replaces_the_file_s(tmp_path, stored, given):
    text = yaml.safe_dump({name: value for name, value in BASE.items() if name != "train-iters"}) + f"{stored}: 11\n"
    config = from_file(tmp_path, text, "--" + given.replace("_", "-"), "3")
    length = {"train_iters": config.run.training.train_iters, "train_epochs": config.batches.train_epochs}
    assert length[given] == 3
    assert sorted(length.values(), key=str) == [3, None]


def test_file_may_spell_keys_with_dashes_and_one_path_as_a_scalar(tmp_path):
    config = from_file(tmp_path, yaml.safe_dump(BASE))
    assert config.data.data_path == ["train.jsonl"]


def test_several_files_after_one_flag():
    assert parse(data_path=["a.jsonl", "b.jsonl"]).data.data_path == ["a.jsonl", "b.jsonl"]


# -- there and back --------------------------------------------------------------------------------------------------

OTHER_VALUES = {
    "num_layers": 8,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 250,
    "normalization": "LayerNorm",
    "rotary_percent": 0.5,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 2,
    "transformer_impl": "transformer_engine",
    "recompute_granularity": "full",
    "recompute_method": "block",
    "attention_backend": "auto",
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bias_swiglu_fusion": False,
    "gradient_accumulation_fusion": True,
    "device": "cpu",
    "sequence_layout": "padded",
    "share_prompt": True,
    "max_tokens_per_microbatch": None,
    "matching_precision": "model",
    "matching_interval": 1,
    "regret_interval": 20,
    "matching_first_tokens": None,
    "matching_certainty": None,
    "data_path": ["a b.jsonl", "c: d.jsonl", "#e.jsonl"],
    "eval_data_path": ["ünï.jsonl"],
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": "007",
    "max_position_embeddings": 4096,
    "max_truncated_share": 0.5,
    "template_date": None,
    "prompt_control_tokens": "refuse",
    "overlong_traces": "refuse",
    "trace_filter": "correct=true,source=human|tora",
    "answer_separator": "\n\n\t# ",
    "forking_token_format": "special",
    "forking_token_template": "<|im_start|><think{i}>\n",
    "forking_token_init": "copy:no",
    "matching": "random",
    "train_iters": None,
    "train_epochs": 3,
    "loss_normalization": "sequence",
    "lr": 1e-3,
    "min_lr": 1e-7,
    "lr_decay_style": "linear",
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": 0.05,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "save": "on",
    "load": "1e5",
    "on_damaged_checkpoint": "older",
    "async_save": False,
    "wandb_project": "null",
}
"""Legal together. Fields that are not named get their default + 1, and booleans their opposite."""


def other_value(field, value):
    if field.name in OTHER_VALUES:
        return OTHER_VALUES[field.name]
    if isinstance(value, bool):
        return not value
    return f"{field.name}.x" if value is None and re.search("str|PathText", str(field.type)) else (value or 0) + 1


def unusual_config():
    default = values_of(parse())
    return build_config({f.name: other_value(f, default[f.name]) for _, f in FIELDS}, SSFTConfig)


def values_of(config):
    """Field name -> value, over all sections."""
    return {name: value for section in flat(config).values() for name, value in section.items()}


def configs():
    """Three that are legal and differ from the defaults in every field between them."""
    streams = {
        "attention_backend": "sdpa",
        "sequence_layout": "concatenated",
        "share_prompt": False,
        "max_tokens_per_microbatch": 77,
    }
    less = {
        "matching_precision": "bf16",
        "matching_interval": 2,
        "matching_first_tokens": 9,
        "matching_certainty": 0.5,
        "regret_interval": 5,
        "max_truncated_share": 0.25,
    }
    prompts = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "folder",
        "template_date": "2024-07-26",
        "prompt_control_tokens": "text",
    }
    saves = {"save": "run", "async_save": True}
    third = parse(forking_token_format="text", lr_warmup_iters=3, **streams, **less, **prompts, **saves)
    return [parse(), unusual_config(), third]


@pytest.mark.parametrize("which", range(3))
def test_yaml_round_trip(tmp_path, which):
    config = configs()[which]
    assert from_file(tmp_path, to_yaml(config)) == config


def test_round_trip_tries_another_value_of_every_field():
    default, *others = [values_of(config) for config in configs()]
    assert [name for name in default if all(other[name] == default[name] for other in others)] == []


def test_round_trip_of_the_file_a_run_leaves(tmp_path):
    """Resolved values (here the head size) stand in the file, and reading it twice changes nothing."""
    once = from_file(tmp_path, to_yaml(parse(hidden_size=96, num_attention_heads=3)))
    assert once.run.model.kv_channels == 32
    assert to_yaml(from_file(tmp_path, to_yaml(once))) == to_yaml(once)


@pytest.mark.parametrize("spelling", ["1e-3", "'1e-3'", "1.0e-3", "0.001", "1E-03"])
def test_float_spellings(tmp_path, spelling):
    assert from_file(tmp_path, yaml.safe_dump(BASE) + f"lr: {spelling}\n").run.training.lr == 1e-3


def test_file_values_get_the_type_of_their_field(tmp_path):
    text = yaml.safe_dump(BASE) + "clip_grad: 2\nseed: 7.0\nwandb_project: 2025\nmax_traces: null\n"
    config = from_file(tmp_path, text)
    assert (config.run.training.clip_grad, type(config.run.training.clip_grad)) == (2.0, float)
    assert (config.run.training.seed, type(config.run.training.seed)) == (7, int)
    assert config.run.logging.wandb_project == "2025"
    assert config.data.max_traces is None


# -- documentation ---------------------------------------------------------------------------------------------------


def test_field_names_are_unique():
    names = [field.name for _, field in FIELDS]
    assert sorted(names) == sorted(set(names))
    assert list(values_of(parse())) == names


def test_every_field_is_documented_and_help_shows_it():
    shown = "".join(build_parser("Some program.").format_help().split())
    for section, field in FIELDS:
        text = field_docstrings(SECTIONS[section]).get(field.name, "")
        assert len(text) > 10, f"{field.name} has no docstring"
        assert "".join(text.split()) in shown, f"{field.name} is not explained"
        assert f"--{field.name.replace('_', '-')}" in shown
    for cls in SECTIONS.values():
        assert "".join(cls.__doc__.split()) in shown


def test_help_shows_defaults():
    shown = " ".join(build_parser("").format_help().split())
    assert "Peak learning rate. [1e-05]" in shown
    assert "passes over" in shown.lower() and "None]" not in shown


# -- dry run ---------------------------------------------------------------------------------------------------------


def everything_below(folder):
    """Path -> content; PyTorch makes an empty folder for its own use in the temporary one when it is imported."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.name.startswith("torchinductor_")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.slow
def test_dry_run_shows_steps_tags_and_plan_and_leaves_nothing(tmp_path):
    rows = [
        {"id": i, "question": f"what is {i}?", "traces": [{"text": "x" * (5 + j)} for j in range(1 + i % 4)]}
        for i in range(12)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    homes = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for folder in homes.values():
        os.mkdir(folder)
    before = everything_below(tmp_path)
    flags = argv(global_batch_size=8, tensor_model_parallel_size=2, seq_length=64, save="run", lr_warmup_iters=3)
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_ssft.py"), *flags, "--dry-run"],
        cwd=tmp_path,
        env=os.environ | homes | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert everything_below(tmp_path) == before
    settings, _, consequences = done.stdout.partition("# what follows from it\n")
    assert "data: 12 questions, 30 traces, 1 to 4 per question" in consequences
    assert "about 4 per epoch, 20 in all, warm-up 3" in consequences
    assert all(f"'<think{i}>' [{256 + i}]" in consequences for i in range(1, 7))
    plan = next(line for line in consequences.splitlines() if line.startswith("first step: "))
    assert "8 traces, 2 microbatches on the first rank, 0 PAD sequences (at least 0)" in plan
    (tmp_path / "printed.yaml").write_text(settings)
    from_printed = parse_arguments("", SSFTConfig, ["--config", str(tmp_path / "printed.yaml")])[0]
    assert from_printed == parse_arguments("", SSFTConfig, flags)[0]
