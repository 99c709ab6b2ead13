"""Configurations that do not exist: each is refused in one line that names the flag, or the file and the key."""

from __future__ import annotations

import re

import pytest
import yaml

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import read_config_file
from tests.helpers.config_flags import from_file, parse, refusal

HUGGING_FACE = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "x"}
REFUSED = [
    ({"num_layers": None}, "--num-layers is required"),
    ({"hidden_size": None}, "--hidden-size is required"),
    ({"num_attention_heads": None}, "--num-attention-heads is required"),
    ({"num_layers": 0}, "--num-layers 0"),
    ({"template_date": "2024-07-26"}, "--template-date 2024-07-26 has no use"),
    ({"prompt_control_tokens": "text"}, "--prompt-control-tokens text has no use"),
    ({"prompt_control_tokens": "yes", **HUGGING_FACE}, "--prompt-control-tokens yes"),
    ({"template_date": "26 Jul 2024", **HUGGING_FACE}, "--template-date 26 Jul 2024"),
    ({"template_date": "2024-02-30", **HUGGING_FACE}, "--template-date 2024-02-30"),
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
    ({"keep_last": 2}, "--keep-last"),
    ({"save": "run", "keep_last": 0}, "--keep-last 0"),
    ({"save": "run", "save_interval": 5, "keep_every": 10}, "--keep-every has no use without --keep-last"),
    ({"save": "run", "keep_last": 1, "keep_every": 10}, "--keep-every 10 must be a multiple of --save-interval"),
    ({"save": "run", "save_interval": 4, "keep_last": 1, "keep_every": 10}, "--keep-every 10 must be a multiple"),
    ({"save": "run", "async_save": True, "export_hf_at_save": True}, "--export-hf-at-save does not go with"),
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
    {"save": "run", "save_interval": 5, "keep_last": 1, "keep_every": 10},
    {"save": "run", "keep_last": 3, "save_optim": False, "async_save": True},
    {"load": "run", "finetune": True},
]


@pytest.mark.parametrize("changes", LEGAL, ids=_name)
def test_neighbours_of_the_refused_pass(changes):
    assert isinstance(parse(**changes), SSFTConfig)


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
