"""Configuration of policy learning: what is refused, what comes from the run, and that YAML gives the same again."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_ssft.config import GFPOConfig, PolicyConfig, SSFTConfig
from megatron_ssft.config.flags import parse_arguments, read_config_file, to_yaml
from megatron_ssft.errors import UserError
from megatron_ssft.training.startup import complete_policy_values, tag_template
from tests.helpers.policy_files import MODEL

RUN_CONFIG = MODEL | {
    "tensor_model_parallel_size": 2,
    "sequence_layout": "concatenated",
    "init_method_std": 0.25,
    "max_tokens_per_microbatch": 500,
    "global_batch_size": 48,
    "matching": "random",
    "lr": 0.5,
    "weight_decay": 0.25,
}
GOOD = ("--rewards", "W", "--data", "Q", "--train-iters", "3")


@pytest.fixture
def run(tmp_path):
    """A folder that looks like a run of two tensor-parallel ranks."""
    return make_run(tmp_path / "run")


def make_run(folder, **changes):
    (folder / "iter_0000007").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(RUN_CONFIG | changes))
    return folder


def parse(*words, config=None):
    """The resolved configuration of a command line."""
    given = [] if config is None else ["--config", str(config)]
    return parse_arguments("", GFPOConfig, [*given, *map(str, words)], complete_policy_values)[0]


def start(run, *words):
    return parse("--load", run, "--save", run.parent / "new", *GOOD, *words)


def refusal(make):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what comes from where -------------------------------------------------------------------------------------------


def test_layout_model_tokenizer_and_tags_come_from_the_run(run):
    config = start(run)
    assert config.run.parallel.tensor_model_parallel_size == 2
    assert (
        config.run.training.sequence_layout == "concatenated" and config.run.training.max_tokens_per_microbatch == 500
    )
    assert (config.run.model.hidden_size, config.run.tokenizer.seq_length) == (16, 64)
    assert config.run.model.make_vocab_size_divisible_by == 8 and config.run.model.init_method_std == 0.25
    assert (config.run.tokenizer.tokenizer_type, config.run.forking.num_forking_tokens) == ("CharTokenizer", 3)


def test_how_the_run_was_trained_is_not_taken_over(run):
    config = start(run)
    assert (config.run.training.lr, config.run.training.weight_decay, config.run.training.lr_decay_style) == (
        1e-5,
        0.0,
        "constant",
    )
    assert not hasattr(config, "matching")


def test_flags_override_the_run_and_the_file(run, tmp_path):
    file = tmp_path / "gfpo.yaml"
    file.write_text(f"load: {run}\nsave: x\nrewards: W\ndata: Q\ntrain-iters: 9\nkl_coef: 0.5\nlr: 1e-3\n")
    config = parse(config=file)
    assert (config.run.training.train_iters, config.policy.kl_coef, config.run.training.lr) == (9, 0.5, 1e-3)
    assert config.run.parallel.tensor_model_parallel_size == 2
    config = parse("--kl-coef", 0.25, "--tensor-model-parallel-size", 1, "--seq-length", 32, config=file)
    assert (config.policy.kl_coef, config.run.training.lr) == (0.25, 1e-3)
    assert (config.run.parallel.tensor_model_parallel_size, config.run.tokenizer.seq_length) == (1, 32)


SETTINGS = [
    (),
    ("--objective", "gfpo-sampled", "--clip-eps-high", 0.3, "--samples-per-question", 4),
    ("--objective", "grpo", "--token-normalization", "sequence", "--no-group-normalization"),
    ("--trainable", "last-2", "--anchor", "none", "--rescore-interval", 0, "--entropy-coef", 0.01),
    ("--trainable", "tag-rows", "--eval-data", "H", "--policy-interval", 2, "--on-stale-rewards", "stop"),
    ("--anchor-coef", 3, "--rollouts", "R", "--reference", ".", "--outside-mass-coef", 0),
]


@pytest.mark.parametrize("words", SETTINGS)
def test_yaml_gives_the_same_configuration_again(run, tmp_path, words):
    config = start(run, *words)
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(config))
    assert parse(config=file) == config
    assert read_config_file(str(file), None)["objective"] == config.policy.objective


# -- another program's settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--matching", "--data-path", "--global-batch-size", "--finetune", "--train-epochs"])
def test_flags_of_ssft_are_refused_in_two_short_lines(run, flag, capsys):
    with pytest.raises(SystemExit) as caught:
        start(run, flag, 1)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and lines[-1].endswith(f"error: unrecognized arguments: {flag} 1")


@pytest.mark.parametrize(
    ("program", "key", "inside"),
    [
        (GFPOConfig, "matching: random", "'matching' is for another program"),
        (GFPOConfig, "global-batch-size: 3", "'global-batch-size' is for another program"),
        (SSFTConfig, "kl_coef: 1", "'kl_coef' is for another program"),
        (GFPOConfig, "kl_coeff: 1", "unknown key 'kl_coeff'"),
        (SSFTConfig, "kl_coeff: 1", "unknown key 'kl_coeff'"),
    ],
)
def test_keys_of_another_program_and_of_none(tmp_path, program, key, inside):
    (tmp_path / "c.yaml").write_text(f"lr: 1\n{key}\n")
    line = refusal(lambda: read_config_file(str(tmp_path / "c.yaml"), program))
    assert line.startswith(f"{tmp_path}/c.yaml:2: ") and inside in line


# -- settings that have no use or make no sense ----------------------------------------------------------------------

USELESS = [
    ("gfpo-exact", {"clip_eps": 0.1}, "--objective gfpo-exact"),
    ("gfpo-exact", {"clip_eps_high": 0.1}, "--objective gfpo-exact"),
    ("gfpo-exact", {"samples_per_question": 8}, "--objective gfpo-exact"),
    ("gfpo-exact", {"policy_epochs": 2}, "--objective gfpo-exact"),
    ("gfpo-exact", {"token_normalization": "token"}, "--objective gfpo-exact"),
    ("gfpo-sampled", {"policy_gradient": "natural"}, "--objective gfpo-sampled"),
    ("grpo", {"policy_gradient": "plain"}, "--objective grpo"),
    ("gfpo-sampled", {"token_normalization": "token"}, "--objective gfpo-sampled"),
    ("grpo", {"samples_per_question": 8}, "--objective grpo"),
    ("grpo", {"policy_epochs": 2}, "--objective grpo"),
    ("grpo", {"outside_mass_coef": 0.1}, "--objective grpo"),
    ("grpo", {"anchor_coef": 1.0}, "--anchor none"),
    ("gfpo-exact", {"anchor": "none", "anchor_coef": 1.0}, "--anchor none"),
    ("gfpo-exact", {"anchor": "none", "anchor_completions": 4}, "--anchor none"),
    ("gfpo-sampled", {"anchor": "none", "anchor_top_k": 4}, "--anchor none"),
]


def policy(objective="gfpo-exact", **changes):
    values = {"data": "Q", "rewards": "W", "objective": objective} | changes
    return PolicyConfig(**{name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize(("objective", "changes", "where"), USELESS)
def test_flags_without_use(objective, changes, where):
    flag = "--" + list(changes)[-1].replace("_", "-")
    assert refusal(lambda: policy(objective, **changes)) == f"{flag} has no use with {where}; leave it out"


WRONG = [
    ({"data": None}, "--data is required"),
    ({"rewards": None}, "gfpo-exact needs --rewards"),
    ({"objective": "ppo"}, "--objective ppo: choose one of gfpo-exact"),
    ({"objective": "grpo", "rewards": None}, "needs --rewards, or --rollouts and --scores"),
    ({"objective": "grpo", "rewards": None, "rollouts": "R"}, "needs --rewards, or --rollouts and --scores"),
    ({"objective": "grpo", "entropy_coef": 0.1}, "--entropy-coef"),
    ({"objective": "grpo", "eval_data": "H"}, "--eval-data"),
    ({"objective": "grpo", "policy_interval": 2}, "--policy-interval"),
    ({"objective": "grpo", "trainable": "tag-rows"}, "--trainable tag-rows"),
    ({"objective": "grpo", "anchor": "kl"}, "--anchor kl: grpo"),
    ({"objective": "grpo", "token_normalization": "words"}, "--token-normalization words"),
    ({"scores": "S"}, "--scores is for grpo"),
    ({"policy_gradient": "steepest"}, "--policy-gradient steepest: choose one of plain, natural"),
    ({"anchor": "l2"}, "--anchor l2: choose one of kl, none"),
    ({"anchor": "none", "rescore_interval": 0, "rollouts": "R"}, "--rollouts has no use"),
    ({"trainable": "last-0"}, "--trainable last-0"),
    ({"trainable": "last-"}, "--trainable last-"),
    ({"trainable": "last-2.5"}, "--trainable last-2.5"),
    ({"trainable": "first-2"}, "--trainable first-2"),
    ({"trainable": "everything"}, "--trainable everything"),
    ({"on_stale_rewards": "panic"}, "--on-stale-rewards panic"),
    ({"on_stale_rewards": "stop", "rescore_interval": 0}, "--on-stale-rewards stop needs --rescore-interval"),
    ({"questions_per_step": 0}, "--questions-per-step 0"),
    ({"rescore_interval": -1}, "--rescore-interval"),
    ({"min_effective_sample_size": 1.5}, "--min-effective-sample-size"),
    ({"min_effective_sample_size": float("nan")}, "--min-effective-sample-size nan"),
    ({"kl_coef": -0.1}, "--kl-coef -0.1"),
    ({"kl_coef": float("inf")}, "--kl-coef inf"),
    ({"entropy_coef": float("nan")}, "--entropy-coef nan"),
    ({"outside_mass_coef": float("inf")}, "--outside-mass-coef inf"),
    ({"outside_mass_coef": -1}, "--outside-mass-coef -1"),
    ({"anchor_coef": 0.0}, "--anchor-coef 0.0"),
    ({"anchor_top_k": 0}, "--anchor-top-k 0"),
    ({"objective": "gfpo-sampled", "clip_eps": 1.0}, "--clip-eps 1.0"),
    ({"objective": "gfpo-sampled", "clip_eps": 0.0}, "--clip-eps 0.0"),
    ({"objective": "gfpo-sampled", "samples_per_question": 1}, "--samples-per-question 1"),
    ({"objective": "gfpo-sampled", "policy_epochs": 0}, "--policy-epochs 0"),
]


@pytest.mark.parametrize(("changes", "inside"), WRONG, ids=[inside for _, inside in WRONG])
def test_wrong_setting(changes, inside):
    assert inside in refusal(lambda: policy(**changes))


def test_defaults_depend_on_the_objective():
    assert [policy(o).group_normalization for o in ("gfpo-exact", "gfpo-sampled", "grpo")] == [False, True, True]
    assert [policy(o).clip_eps for o in ("gfpo-exact", "gfpo-sampled", "grpo")] == [None, 0.2, 0.2]
    assert [policy(o).policy_gradient for o in ("gfpo-exact", "gfpo-sampled", "grpo")] == ["plain", None, None]
    assert policy("grpo", clip_eps=0.3).clip_eps_high == 0.3
    assert [policy(trainable=t).anchor for t in ("all", "last-2", "tag-rows")] == ["kl", "kl", "kl"]
    assert policy("grpo").anchor == "none"
    assert [policy(trainable=t).last_layers for t in ("all", "last-12", "tag-rows")] == [None, 12, 0]


TOGETHER = [
    (("--context-parallel-size", 2), "--context-parallel-size 2: the tags"),
    (("--trainable", "last-99"), "--trainable last-99: the model has 2 layers"),
    (("--trainable", "tag-rows", "--forking-token-format", "text"), "needs --forking-token-format special"),
    (("--num-forking-tokens", 1), "--objective gfpo-exact needs a model with 2 or more"),
    (("--num-forking-tokens", 0, "--objective", "grpo"), "--objective grpo needs a model with 1 or more"),
]


@pytest.mark.parametrize(("words", "inside"), TOGETHER)
def test_settings_that_do_not_go_together(run, words, inside):
    assert inside in refusal(lambda: start(run, *words))


def test_context_parallelism_of_the_run_is_refused_by_its_own_name(tmp_path):
    run = make_run(tmp_path / "run", context_parallel_size=2, transformer_impl="transformer_engine")
    assert refusal(lambda: start(run)).startswith("--context-parallel-size 2: the tags")
    config = start(run, "--context-parallel-size", 1)
    assert (config.run.parallel.context_parallel_size, config.run.model.transformer_impl) == (1, "transformer_engine")


# -- folders ---------------------------------------------------------------------------------------------------------


def test_what_is_required(run):
    assert refusal(lambda: parse(*GOOD)).startswith("--load is required")
    assert refusal(lambda: parse("--load", run, "--save", "x")).startswith("--train-iters is required")
    assert refusal(lambda: parse("--load", run, *GOOD)).startswith("--save is required")


def test_load_that_is_no_run(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(lambda: start(tmp_path / "none")).endswith("no such folder")
    assert "is empty; give a run folder" in refusal(lambda: start(tmp_path / "empty"))
    assert "is empty; give a run folder" in refusal(lambda: start(run / "iter_0000007"))
    (run / "iter_0000007").rmdir()
    assert "holds no checkpoint" in refusal(lambda: start(run))


def test_saving_into_the_run_to_start_from(run):
    assert refusal(lambda: start(run, "--save", run / ".")).startswith(f"--save {run}: is what to start from")
    started = make_run(run.parent / "gfpo", objective="gfpo-exact")
    (started / "config.yaml").write_text(to_yaml(start(run)))
    assert start(started, "--save", started).run.checkpoint.save == str(started)


def test_reference_that_is_absent(run, tmp_path):
    assert refusal(lambda: start(run, "--reference", tmp_path / "none")).startswith(f"--reference {tmp_path}/none")
    started = make_run(tmp_path / "gfpo", objective="gfpo-exact")
    start(started, "--save", started, "--reference", tmp_path / "none")  # its answers are kept, so it may be gone


# -- tags of an export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["<think{i}>", "{i}", "<1|{i}|2>\n", "a{i}b{i}c", "<|im_start|><think{i}>\n"])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_template_is_found_again(template, count):
    assert tag_template([template.replace("{i}", str(i)) for i in range(1, count + 1)]) == template


def test_template_of_one_tag_spells_it():
    for string in ("<think1>", "1", "a1b1"):
        assert tag_template([string]).replace("{i}", "1") == string


@pytest.mark.parametrize(
    "strings", [["<a>", "<b>"], ["<2>", "<1>"], ["<1>", "<2>", "<4>"], ["<x>"], ["<1>", "<2>x"], ["<0>", "<1>"]]
)
def test_strings_without_a_template(strings):
    assert tag_template(strings) is None


def test_export_without_tags_is_refused_unless_flags_name_them(tmp_path):
    llama = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }  # fmt: skip
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama))
    words = ("--tokenizer-type", "CharTokenizer")
    assert "has no forking_tokens.json" in refusal(lambda: start(folder, *words))
    assert start(folder, *words, "--num-forking-tokens", 4).run.forking.num_forking_tokens == 4
