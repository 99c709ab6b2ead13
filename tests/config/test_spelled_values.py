"""A value is what was spelled, in a file and on the command line, or it is refused."""

from __future__ import annotations

import os
import re

import pytest
import yaml

from megatron_ssft.cli import score
from megatron_ssft.cli.generate import GenerateFlags
from megatron_ssft.cli.options import parse_options
from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import parse_arguments
from tests.helpers.config_flags import BASE, argv, from_file, parse, refusal


def file_with(tmp_path, line):
    """The configuration of the base file with one more line, or with a line of it replaced."""
    key = line.partition(":")[0].replace("-", "_")
    kept = {name.replace("-", "_"): value for name, value in BASE.items()}
    kept.pop(key, None)
    return from_file(tmp_path, yaml.safe_dump(kept) + line + "\n")


def test_a_repeated_list_is_joined():
    words = [*argv(data_path=None), "--data-path", "a.jsonl", "b.jsonl", "--data-path", "c.jsonl"]
    paths = parse_arguments("", SSFTConfig, words)[0].data.data_path
    assert paths == ["a.jsonl", "b.jsonl", "c.jsonl"]
    words += ["--eval-data-path", "d.jsonl", "--eval-data-path", "e.jsonl"]
    assert parse_arguments("", SSFTConfig, words)[0].data.eval_data_path == ["d.jsonl", "e.jsonl"]


def test_a_flag_replaces_the_list_of_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({n.replace("-", "_"): v for n, v in BASE.items()}))
    words = ["--config", str(tmp_path / "config.yaml"), "--data-path", "b.jsonl", "--data-path", "c.jsonl"]
    assert parse_arguments("", SSFTConfig, words)[0].data.data_path == ["b.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    ("text", "key"),
    [("lr: 1e-4\nlr: 1e-5\n", "lr"), ("matching-tokens: 5\nseed: 1\nmatching_tokens: 6\n", "matching_tokens")],
)
def test_a_key_given_twice_is_refused(tmp_path, text, key):
    found = refusal(lambda: from_file(tmp_path, text))
    lines = [number for number, line in enumerate(text.split("\n"), start=1) if line.replace("-", "_").startswith(key)]
    assert re.findall(r"config\.yaml:(\d+)", found) == [str(lines[1]), str(lines[0])] and key in found


NOT_NUMBERS = ["1_000", "007", "0x10", "0o17", "12:30", "1:30.5", "1,5", "1 000", "0b11", "one", "''", "2001-01-01"]


@pytest.mark.parametrize("word", NOT_NUMBERS)
@pytest.mark.parametrize("key", ["seed", "lr", "global_batch_size"])
def test_other_spellings_of_numbers_are_refused(tmp_path, capsys, key, word):
    found = refusal(lambda: file_with(tmp_path, f"{key}: {word}"))
    assert re.match(re.escape(f"{tmp_path}/config.yaml:") + rf"\d+: {key}: ", found)
    with pytest.raises(SystemExit):
        parse_arguments("", SSFTConfig, [*argv(BASE), f"--{key.replace('_', '-')}", word.strip("'")])
    said = capsys.readouterr().err
    assert f"argument --{key.replace('_', '-')}: invalid" in said and ": write a " in said


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("seed: 7", 7),
        ("seed: 7.0", 7),
        ("seed: 1e3", 1000),
        ("seed: +7", 7),
        ("seed: '7'", 7),
        ("weight_decay: 1", 1.0),
        ("weight_decay: .5", 0.5),
        ("weight_decay: 5.E-1", 0.5),
        ("weight_decay: 0", 0.0),
        ("answer_separator: 007", "007"),
        ("answer_separator: 1.10", "1.10"),
        ("answer_separator: 12:30", "12:30"),
        ("answer_separator: 1_000", "1_000"),
        ("answer_separator: 2026-01-02 03:04:05", "2026-01-02 03:04:05"),
        ("answer_separator: 'null'", "null"),
        ("answer_separator: 'None'", "None"),
        ("forking_token_template: <$x{i}~>", "<$x{i}~>"),
    ],
)
def test_values_are_kept_as_they_are_spelled(tmp_path, line, value):
    config = file_with(tmp_path, line)
    sections = vars(config) | vars(config.run) | {"forking": config.run.forking}
    key = line.partition(":")[0]
    found = [getattr(section, key) for section in sections.values() if hasattr(section, key)]
    assert found == [value] and type(found[0]) is type(value)


@pytest.mark.parametrize("key", ["lr", "data_path", "seed", "matching", "share_prompt", "eval_data_path"])
@pytest.mark.parametrize("word", ["null", "~", ""])
def test_null_where_a_value_is_needed_is_refused(tmp_path, key, word):
    found = refusal(lambda: file_with(tmp_path, f"{key}: {word}"))
    assert f"{key} needs a value" in found and re.search(r"config\.yaml:\d+: ", found)


@pytest.mark.parametrize("key", ["load", "save", "max_traces", "train_epochs", "ffn_hidden_size"])
def test_null_is_the_default_where_there_is_none(tmp_path, key):
    assert file_with(tmp_path, f"{key}: null") == file_with(tmp_path, "")


@pytest.mark.parametrize("key", ["load", "save", "trace_filter", "tokenizer_model", "data_path"])
def test_none_is_no_text(tmp_path, key):
    assert "write null" in refusal(lambda: file_with(tmp_path, f"{key}: None"))
    assert "write null" in refusal(lambda: file_with(tmp_path, "data_path: [a.jsonl, None]"))


def test_home_and_variables_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/users/her")
    monkeypatch.setenv("RUNS", "/scratch/ssft")
    monkeypatch.delenv("NOT_SET", raising=False)
    config = file_with(tmp_path, "data_path: [~/a.jsonl, '$RUNS/b.jsonl', '${RUNS}/c.jsonl', d~.jsonl]")
    assert config.data.data_path == ["/users/her/a.jsonl", "/scratch/ssft/b.jsonl", "/scratch/ssft/c.jsonl", "d~.jsonl"]
    assert file_with(tmp_path, "save: ~/run").run.checkpoint.save == "/users/her/run"
    assert parse(save="~/run").run.checkpoint.save == "/users/her/run"  # no shell does that in --save=~/run
    for key in ("save", "tensorboard_dir", "data_cache_path"):
        assert "no variable $NOT_SET" in refusal(lambda key=key: file_with(tmp_path, f"{key}: $NOT_SET/x"))
    assert "no user 'nobody-of-that-name'" in refusal(lambda: file_with(tmp_path, "save: ~nobody-of-that-name/x"))
    words = ["--data", "~/q.jsonl", "--output", "$RUNS/o", "--model", "m"]
    options = parse_options(GenerateFlags, "", words)
    assert [str(options.data), str(options.output)] == ["/users/her/q.jsonl", "/scratch/ssft/o"]


@pytest.mark.parametrize("flag", ["--save", "--load", "--data-path", "--wandb-project", "--forking-token-template"])
def test_bytes_of_another_encoding_are_refused(flag, capsys):
    """They come as halves of surrogate pairs, which no file of ours could hold."""
    word = os.fsdecode(b"caf\xe9")
    with pytest.raises(SystemExit) as ended:
        parse_arguments("", SSFTConfig, [flag, word])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and f"{flag}" in message and "not valid UTF-8" in message


@pytest.mark.parametrize("text", ['wandb_project: "a\\ud800"', 'save: "a\\ud800"', 'data_path: ["a\\udce9.jsonl"]'])
def test_half_a_surrogate_pair_in_a_file_is_refused(tmp_path, text):
    """As YAML can spell it."""
    found = refusal(lambda: from_file(tmp_path, text))
    assert re.match(re.escape(f"{tmp_path}/config.yaml:1: ") + r".*not valid UTF-8", found)


@pytest.mark.parametrize("gone", [False, True])
def test_a_relative_path_needs_a_working_folder_that_can_be_written_down(tmp_path, monkeypatch, capsys, gone):
    """A run's own configuration holds paths from the root: it could not be read again."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    if gone:
        folder.rmdir()
    with pytest.raises(SystemExit) as ended:
        parse_arguments("", SSFTConfig, argv(data_path="/d.jsonl") + ["--save", "run"])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "--save" in message and "working folder" in message
    config, *_ = parse_arguments("", SSFTConfig, argv(data_path="/d.jsonl") + ["--save", str(tmp_path / "run")])
    assert config.run.checkpoint.save == str(tmp_path / "run")


def test_other_programs_refuse_them_too(capsys):
    with pytest.raises(SystemExit):
        score.main([os.fsdecode(b"r\xff.jsonl"), "--data", "q.jsonl", "--verifier", "exact", "--output", "s.jsonl"])
    assert "not valid UTF-8" in capsys.readouterr().err


def test_a_name_with_a_dollar_that_is_there_is_that_file(tmp_path):
    (tmp_path / "a$b.jsonl").touch()
    config = file_with(tmp_path, f"data_path: {tmp_path}/a$b.jsonl")
    assert config.data.data_path == [f"{tmp_path}/a$b.jsonl"]


@pytest.mark.parametrize("key", ["weight_decay", "clip_grad", "lr", "forking_token_noise", "init_method_std"])
@pytest.mark.parametrize("word", ["inf", "nan", "1e400"])
def test_infinite_values_are_refused(tmp_path, key, word):
    for call in (lambda: file_with(tmp_path, f"{key}: {word}"), lambda: parse(**{key: word})):
        assert refusal(call).startswith(f"--{key.replace('_', '-')} ")


@pytest.mark.parametrize("text", ["[" * 100_000, "lr: " + "[" * 100_000, "a: {" * 2_000])
def test_deep_nesting_is_one_line(tmp_path, text):
    found = refusal(lambda: from_file(tmp_path, text))
    assert found.startswith(str(tmp_path / "config.yaml")) and "\n" not in found
