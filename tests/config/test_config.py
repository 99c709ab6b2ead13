"""Flags, files and defaults: what wins, what is refused and how, and what --help and --dry-run promise."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from megatron_ssft.config import Config
from megatron_ssft.config.fields import field_docstrings
from megatron_ssft.config.flags import build_parser, parse_arguments, read_config_file, to_yaml
from megatron_ssft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = typing.get_type_hints(Config)
FIELDS = [(section, field) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]
BASE = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "data-path": "train.jsonl",
    "tokenizer-type": "CharTokenizer",
    "train-iters": 20,
}


def argv(base=BASE, **changes):
    """The base flags with some replaced (or, None, left out); True and False become --x and --no-x."""
    flags = base | {name.replace("_", "-"): value for name, value in changes.items()}
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse(*words, **changes):
    return parse_arguments("", [*argv(**changes), *words])[0]


def from_file(tmp_path, text, *words):
    """The configuration of a file alone, plus flags."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_arguments("", ["--config", str(path), *words])[0]


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


# -- what wins -------------------------------------------------------------------------------------------------------


def test_flag_beats_file_and_file_beats_default(tmp_path):
    text = yaml.safe_dump({name.replace("-", "_"): value for name, value in BASE.items()})
    assert from_file(tmp_path, text).training.lr == 1e-5
    assert from_file(tmp_path, text + "lr: 0.25\n").training.lr == 0.25
    assert from_file(tmp_path, text + "lr: 0.25\n", "--lr", "0.5").training.lr == 0.5


def test_flag_at_its_default_value_still_beats_the_file(tmp_path):
    text = yaml.safe_dump(BASE) + "swiglu: false\nseed: 7\nforking-token-lr-mult: 30\n"
    config = from_file(tmp_path, text, "--swiglu", "--seed", "1234", "--forking-token-lr-mult", "1.0")
    assert (config.model.swiglu, config.training.seed, config.forking.forking_token_lr_mult) == (True, 1234, 1.0)
    assert from_file(tmp_path, text, "--no-add-bias-linear").model.swiglu is False


@pytest.mark.parametrize("stored", ["train_iters", "train_epochs"])
@pytest.mark.parametrize("given", ["train_iters", "train_epochs"])
def test_length_on_the_command_line_replaces_the_file_s(tmp_path, stored, given):
    text = yaml.safe_dump({name: value for name, value in BASE.items() if name != "train-iters"}) + f"{stored}: 11\n"
    training = from_file(tmp_path, text, "--" + given.replace("_", "-"), "3").training
    assert getattr(training, given) == 3
    assert (training.train_iters is None) != (training.train_epochs is None)


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
    "sequence_layout": "padded",
    "share_prompt": True,
    "max_tokens_per_microbatch": None,
    "matching_precision": "model",
    "matching_interval": 1,
    "matching_first_tokens": None,
    "matching_certainty": None,
    "data_path": ["a b.jsonl", "c: d.jsonl", "#e.jsonl"],
    "eval_data_path": ["ünï.jsonl"],
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": "007",
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
    "wandb_project": "null",
}
"""Legal together. Fields that are not named get their default + 1, and booleans their opposite."""


def other_value(field, config):
    if field.name in OTHER_VALUES:
        return OTHER_VALUES[field.name]
    value = getattr(config, field.name)
    if isinstance(value, bool):
        return not value
    return f"{field.name}.x" if value is None and "str" in str(field.type) else (value or 0) + 1


def unusual_config():
    default = parse()
    parts = {}
    for section, cls in SECTIONS.items():
        part = getattr(default, section)
        parts[section] = cls(**{f.name: other_value(f, part) for f in dataclasses.fields(cls)})
    return Config(**parts)


def configs():
    """Three that are legal and differ from the defaults in every field between them."""
    streams = {
        "attention_backend": "sdpa",
        "sequence_layout": "concatenated",
        "share_prompt": False,
        "max_tokens_per_microbatch": 77,
    }
    less = {"matching_precision": "bf16", "matching_interval": 2, "matching_first_tokens": 9, "matching_certainty": 0.5}
    return [parse(), unusual_config(), parse(forking_token_format="text", lr_warmup_iters=3, **streams, **less)]


@pytest.mark.parametrize("which", range(3))
def test_yaml_round_trip(tmp_path, which):
    config = configs()[which]
    assert from_file(tmp_path, to_yaml(config)) == config


def test_round_trip_tries_another_value_of_every_field():
    default, *others = [config.flat() for config in configs()]
    assert [name for name in default if all(other[name] == default[name] for other in others)] == []


def test_round_trip_of_the_file_a_run_leaves(tmp_path):
    """Resolved values (here the head size) stand in the file, and reading it twice changes nothing."""
    once = from_file(tmp_path, to_yaml(parse(hidden_size=96, num_attention_heads=3)))
    assert once.model.kv_channels == 32
    assert to_yaml(from_file(tmp_path, to_yaml(once))) == to_yaml(once)


@pytest.mark.parametrize("spelling", ["1e-3", "'1e-3'", "1.0e-3", "0.001", "1E-03"])
def test_float_spellings(tmp_path, spelling):
    assert from_file(tmp_path, yaml.safe_dump(BASE) + f"lr: {spelling}\n").training.lr == 1e-3


def test_file_values_get_the_type_of_their_field(tmp_path):
    text = yaml.safe_dump(BASE) + "clip_grad: 2\nseed: 7.0\nwandb_project: 2025\nmax_traces: null\n"
    config = from_file(tmp_path, text)
    assert (config.training.clip_grad, type(config.training.clip_grad)) == (2.0, float)
    assert (config.training.seed, type(config.training.seed)) == (7, int)
    assert config.logging.wandb_project == "2025"
    assert config.data.max_traces is None


# -- documentation ---------------------------------------------------------------------------------------------------


def test_field_names_are_unique():
    names = [field.name for _, field in FIELDS]
    assert sorted(names) == sorted(set(names))
    assert list(parse().flat()) == names


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


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [
    ({"num_layers": None}, "--num-layers is required"),
    ({"hidden_size": None}, "--hidden-size is required"),
    ({"num_attention_heads": None}, "--num-attention-heads is required"),
    ({"num_layers": 0}, "--num-layers 0"),
    ({"hidden_size": -64}, "--hidden-size -64"),
    ({"ffn_hidden_size": 0}, "--ffn-hidden-size 0"),
    ({"norm_epsilon": 0}, "--norm-epsilon"),
    ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by 0"),
    ({"normalization": "BatchNorm"}, "--normalization BatchNorm"),
    ({"transformer_impl": "jax"}, "--transformer-impl jax"),
    ({"hidden_size": 66}, "--hidden-size 66"),
    ({"num_query_groups": 3}, "--num-query-groups 3"),
    ({"num_query_groups": 8}, "--num-query-groups 8"),
    ({"rotary_percent": 0}, "--rotary-percent"),
    ({"rotary_percent": 1.5}, "--rotary-percent 1.5"),
    ({"kv_channels": 15}, "--kv-channels"),
    ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size 0"),
    ({"tensor_model_parallel_size": 3}, "--num-attention-heads 4"),
    ({"tensor_model_parallel_size": 4, "num_query_groups": 2}, "--num-query-groups 2"),
    ({"tensor_model_parallel_size": 2, "ffn_hidden_size": 129}, "--ffn-hidden-size 129"),
    ({"sequence_parallel": True}, "--sequence-parallel"),
    ({"pipeline_model_parallel_size": 3}, "--pipeline-model-parallel-size 3"),
    ({"pipeline_model_parallel_size": 8}, "--pipeline-model-parallel-size 8"),
    ({"num_layers_per_virtual_pipeline_stage": 1}, "--num-layers-per-virtual-pipeline-stage"),
    (
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
        "--num-layers-per-virtual-pipeline-stage 2",
    ),
    (
        {"num_layers": 12, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4},
        "--num-layers-per-virtual-pipeline-stage 4",
    ),
    ({"context_parallel_size": 2, "sequence_layout": "padded"}, "--context-parallel-size"),
    ({"context_parallel_size": 2, "transformer_impl": "transformer_engine"}, "--sequence-layout padded"),
    ({"sequence_layout": "padded", "attention_backend": "sdpa"}, "--attention-backend sdpa"),
    ({"matching": "single", "matching_precision": "bf16"}, "--matching-precision bf16"),
    ({"sequence_layout": "thd"}, "--sequence-layout thd"),
    ({"sequence_layout": "padded", "share_prompt": False}, "--no-share-prompt"),
    ({"sequence_layout": "padded", "max_tokens_per_microbatch": 9}, "--max-tokens-per-microbatch"),
    ({"max_tokens_per_microbatch": 0}, "--max-tokens-per-microbatch 0"),
    ({"attention_backend": "flex"}, "--attention-backend flex"),
    ({"attention_efficiency": 0}, "--attention-efficiency 0"),
    ({"matching_precision": "fp8"}, "--matching-precision fp8"),
    ({"matching_precision": "bf16", "bf16": True}, "--matching-precision bf16"),
    ({"matching_interval": 0}, "--matching-interval 0"),
    ({"matching_interval": 2, "matching": "random"}, "--matching optimal, not random"),
    ({"matching_first_tokens": 9}, "--matching-certainty"),
    ({"matching_certainty": 0.1}, "--matching-first-tokens"),
    ({"matching_first_tokens": 1000, "matching_certainty": 0.1}, "--matching-first-tokens 1000"),
    ({"matching_first_tokens": 9, "matching_certainty": 0}, "--matching-certainty 0"),
    ({"regret_interval": -1}, "--regret-interval"),
    ({"gpu_peak_tflops": 0}, "--gpu-peak-tflops 0"),
    ({"recompute_granularity": "some"}, "--recompute-granularity some"),
    ({"recompute_granularity": "full", "recompute_method": "all"}, "--recompute-method all"),
    ({"data_path": None}, "--data-path is required"),
    ({"tokenizer_type": "WordTokenizer"}, "--tokenizer-type WordTokenizer"),
    ({"tokenizer_type": "HuggingFaceTokenizer"}, "--tokenizer-model"),
    ({"tokenizer_type": None}, "--tokenizer-model"),
    ({"seq_length": 0}, "--seq-length 0"),
    ({"max_traces": 0}, "--max-traces 0"),
    ({"overlong_traces": "split"}, "--overlong-traces split"),
    ({"num_forking_tokens": -1}, "--num-forking-tokens"),
    ({"forking_token_format": "emoji"}, "--forking-token-format emoji"),
    ({"forking_token_format": "text", "forking_token_lr_mult": 100}, "--forking-token-lr-mult"),
    ({"forking_token_lr_mult": 0}, "--forking-token-lr-mult"),
    ({"forking_token_init": "zero"}, "--forking-token-init zero"),
    ({"forking_token_noise": -1}, "--forking-token-noise"),
    ({"forking_token_template": "<think>"}, "--forking-token-template"),
    ({"matching": "greedy"}, "--matching greedy"),
    ({"matching_tokens": 0}, "--matching-tokens 0"),
    ({"log_matching_interval": -1}, "--log-matching-interval"),
    ({"train_iters": None}, "--train-iters"),
    ({"train_epochs": 2}, "--train-epochs"),
    ({"train_iters": 0}, "--train-iters 0"),
    ({"micro_batch_size": 0}, "--micro-batch-size 0"),
    ({"global_batch_size": 0}, "--global-batch-size 0"),
    ({"question_lookahead": -1}, "--question-lookahead -1"),
    ({"loss_normalization": "none"}, "--loss-normalization none"),
    ({"lr": 0}, "--lr 0"),
    ({"lr": "nan"}, "--lr nan"),
    ({"lr": "inf"}, "--lr inf"),
    ({"min_lr": 1}, "--min-lr 1"),
    ({"min_lr": -1}, "--min-lr -1"),
    ({"lr_decay_style": "step"}, "--lr-decay-style step"),
    ({"lr_decay_iters": 0}, "--lr-decay-iters 0"),
    ({"lr_warmup_iters": -1}, "--lr-warmup-iters"),
    ({"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction"),
    ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 2}, "--lr-warmup-fraction"),
    ({"weight_decay": -0.1}, "--weight-decay"),
    ({"clip_grad": -1}, "--clip-grad"),
    ({"adam_beta1": 1}, "--adam-beta1"),
    ({"adam_beta2": -0.1}, "--adam-beta2"),
    ({"adam_eps": 0}, "--adam-eps"),
    ({"save_interval": 5}, "--save-interval"),
    ({"save": "run", "save_interval": 0}, "--save-interval 0"),
    ({"finetune": True}, "--finetune"),
    ({"eval_interval": 5}, "--eval-interval"),
    ({"eval_questions": 0}, "--eval-questions 0"),
    ({"distributed_timeout_minutes": 0}, "--distributed-timeout-minutes 0"),
]


def _name(case):
    return "-".join(f"{name}={value}" for name, value in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("changes", "flag"), REFUSED, ids=_name)
def test_refused_with_one_line_that_names_the_flag(changes, flag):
    assert flag in refusal(lambda: parse(**changes))


LEGAL = [
    {"context_parallel_size": 2, "transformer_impl": "transformer_engine", "sequence_layout": "padded"},
    {"sequence_layout": "concatenated", "share_prompt": False, "max_tokens_per_microbatch": 9},
    {"matching_first_tokens": 9, "matching_certainty": 0.1, "matching_interval": 3},
    {"sequence_parallel": True, "tensor_model_parallel_size": 2},
    {"num_layers": 8, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
    {"forking_token_lr_mult": 100},
    {"forking_token_format": "text"},
    {"train_iters": None, "train_epochs": 2},
    {"hidden_size": 66, "kv_channels": 16},
    {"eval_interval": 5, "eval_data_path": "held_out.jsonl"},
    {"save": "run", "save_interval": 5},
    {"load": "run", "finetune": True},
]


@pytest.mark.parametrize("changes", LEGAL, ids=_name)
def test_neighbours_of_the_refused_pass(changes):
    assert isinstance(parse(**changes), Config)


@pytest.mark.parametrize("text", ["lr: fast", "seed: 1.5", "train_iters: [1]", "hidden_size: true", "seed: .inf"])
def test_wrong_type_in_a_file_names_file_and_key(tmp_path, text):
    found = refusal(lambda: from_file(tmp_path, text))
    assert found.startswith(str(tmp_path / "config.yaml")) and text.split(":")[0] in found


@pytest.mark.parametrize("text", ["swiglu: 1", "swiglu: 'yes'", "bf16: maybe", "save: false"])
def test_truth_values_are_neither_guessed_nor_passed_on(tmp_path, text):
    assert text.split(":")[0] in refusal(lambda: from_file(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["learning_rate: 1", "LR: 1", "config: other.yaml", "dry_run: true", "1: 2", "model: {}"]
)
def test_unknown_key_names_file_and_key(tmp_path, text):
    found = refusal(lambda: from_file(tmp_path, text))
    assert found.startswith(str(tmp_path / "config.yaml")) and repr(yaml.safe_load(text.split(":")[0])) in found


@pytest.mark.parametrize(
    ("text", "line"),
    [("lr: 1\nseed: [1, 2\n", 3), ("lr: 1\n\tseed: 2\n", 2), ("lr: 1\nseed: 2: 3\n", 2), ("lr: 'x\n", None)],
)
def test_broken_yaml_names_file_and_line(tmp_path, text, line):
    found = refusal(lambda: from_file(tmp_path, text))
    place = re.match(re.escape(str(tmp_path / "config.yaml")) + r":(\d+): ", found)
    assert place and line in (None, int(place[1]))


@pytest.mark.parametrize("text", ["", "- lr: 1\n", "just words\n", "# nothing\n", "5"])
def test_file_that_is_no_mapping(tmp_path, text):
    assert refusal(lambda: from_file(tmp_path, text)).startswith(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("content", [b"lr: 1\x00\n", b"\xff\xfe\x00lr", b"\x80PNG\r\n"])
def test_file_that_is_no_text(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert refusal(lambda: read_config_file(str(path))).startswith(str(path))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["absent", "folder"])
def test_file_that_cannot_be_read(tmp_path, make):
    make(tmp_path / "config.yaml")
    assert refusal(lambda: read_config_file(str(tmp_path / "config.yaml"))).startswith(str(tmp_path / "config.yaml"))


def test_yaml_builds_no_objects(tmp_path):
    marker = tmp_path / "ran"
    text = f"lr: !!python/object/apply:os.system ['touch {marker}']\n"
    assert refusal(lambda: from_file(tmp_path, text)).startswith(str(tmp_path / "config.yaml"))
    assert not marker.exists()


@pytest.mark.parametrize("words", [["--learning-rate", "1"], ["--lr", "fast"], ["--train-iters", "1.5"], ["stray"]])
def test_wrong_command_line_ends_with_status_2_and_names_the_word(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last and words[0] in last


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
    assert "data: 12 questions, 30 traces, 1 to 4 a question" in consequences
    assert "about 4 an epoch, 20 in all, warm-up 3" in consequences
    assert all(f"'<think{i}>' [{256 + i}]" in consequences for i in range(1, 7))
    plan = next(line for line in consequences.splitlines() if line.startswith("first step: "))
    assert "8 traces, 2 microbatches on the first rank, 0 PAD sequences (at least 0)" in plan
    (tmp_path / "printed.yaml").write_text(settings)
    assert parse_arguments("", ["--config", str(tmp_path / "printed.yaml")])[0] == parse_arguments("", flags)[0]
