"""Pipes, devices and folders given as any path of any program: one line each, and no hang."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ssft.cli.main import COMMANDS
from megatron_ssft.cli.options import parse_options
from megatron_ssft.config import GFPOConfig, SSFTConfig
from megatron_ssft.config.fields import flag_fields
from megatron_ssft.config.flags import fields_of, parse_arguments
from megatron_ssft.errors import UserError
from tests.helpers.paths import ROOT

SPECIAL = {"pipe": "is a pipe", "/dev/zero": "is a device", "/dev/full": "is a device", "/dev/stdin": "is a"}
SECONDS = 20
"""Until something that hangs is interrupted."""


@pytest.fixture(autouse=True)
def in_time():
    """A hang fails the test and does not hold up the others."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still busy after {SECONDS} s"))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


def is_path(field):
    return field.flag.path or field.kind is Path


def path_flags():
    """(dataclass or configuration, field) of every path flag of every program."""
    for command in COMMANDS.values():
        module = importlib.import_module(f"megatron_ssft.cli.{command.module}")
        for name, cls in inspect.getmembers(module, dataclasses.is_dataclass):
            if cls.__module__ == module.__name__ and name.endswith("Flags"):
                for field in filter(is_path, flag_fields(cls)):
                    yield pytest.param(cls, field, id=f"{command.module}-{name}-{field.name}")
    for config in (SSFTConfig, GFPOConfig):
        for _, field in fields_of(config).values():
            if is_path(field):
                yield pytest.param(config, field, id=f"{config.__name__}-{field.name}")


def place_of(name, tmp_path):
    if name == "pipe":
        os.mkfifo(tmp_path / "pipe")
        return tmp_path / "pipe"
    if name == "/dev/stdin" and not os.path.exists(name):
        pytest.skip("needs a standard input")
    return Path(name)


def words_of(cls, field, place):
    """A command line whose one special path is that of `field`; the others are files that are not there."""
    words = []
    for other in flag_fields(cls):
        value = str(place) if other.name == field.name else "absent"
        is_given = other.name == field.name or other.default is dataclasses.MISSING
        if not is_given:
            continue
        if other.flag.choices:
            value = other.flag.choices[0]
        elif other.kind in (int, float):
            value = "1"
        words += [value] if other.flag.positional else [f"--{other.name.replace('_', '-')}", value]
    return words


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize(("cls", "field"), list(path_flags()))
def test_no_path_flag_takes_a_pipe_or_device(cls, field, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    place = place_of(name, tmp_path)
    if name == "/dev/stdin" and place.stat().st_mode & 0o170000 == 0o100000:
        pytest.skip("standard input is a regular file here")
    with pytest.raises(UserError) as caught:
        if cls in (SSFTConfig, GFPOConfig):
            parse_arguments("", cls, [f"--{field.name.replace('_', '-')}", str(place)])
        else:
            parse_options(cls, "", words_of(cls, field, place))
    text = str(caught.value)
    assert f"{place}: {SPECIAL[name]}" in text and "\n" not in text


def test_the_configuration_file_is_none_either(tmp_path):
    for place in (place_of("pipe", tmp_path), Path("/dev/zero")):
        with pytest.raises(UserError, match=f"^--config {place}: is a "):
            parse_arguments("", SSFTConfig, ["--config", str(place)])


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "forking_tokens.json",
    ],
)
@pytest.mark.parametrize("flag", ["--load", "--tokenizer-model"])
def test_a_pipe_in_a_model_folder_is_refused(tmp_path, name, flag):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: is a pipe"):
        parse_arguments("", SSFTConfig, [flag, str(tmp_path)])


@pytest.mark.parametrize(
    "name", ["config.yaml", "latest_checkpointed_iteration.txt", "metrics.jsonl", "hf/tokenizer.json"]
)
def test_a_link_to_a_device_in_a_run_folder_is_refused(tmp_path, name):
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "hf").mkdir()
    for other in ("config.yaml", "hf/config.json"):
        (tmp_path / other).write_text("")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: is a device"):
        parse_arguments("", SSFTConfig, ["--load", str(tmp_path)])


def test_other_folders_may_hold_what_they_like(tmp_path):
    os.mkfifo(tmp_path / "somebodys")
    words = ["--data-cache-path", str(tmp_path), "--data-path", "x", "--tokenizer-type", "CharTokenizer"]
    shape = ["--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "2", "--train-iters", "2"]
    assert parse_arguments("", SSFTConfig, [*words, *shape])[0].data.data_cache_path == str(tmp_path)


FOLDERS = [
    ["score", "FOLDER", "--data", "FOLDER", "--verifier", "exact", "--output", "out.jsonl"],
    ["generate", "--model", "FOLDER", "--data", "FOLDER", "--output", "out.jsonl"],
    ["evaluate", "FOLDER", "--output", "evaluated"],
    ["report", "FOLDER", "--output", "r.html"],
    ["evaluate-policy", *(f"--{name}=FOLDER" for name in ("before", "after", "own", "own-greedy", "rewards"))]
    + ["--output", "o"],
    ["train", "--config", "FOLDER"],
]


@pytest.mark.slow
@pytest.mark.parametrize("words", FOLDERS, ids=lambda words: words[0])
def test_an_empty_folder_where_a_file_is_meant_is_one_line(words, tmp_path):
    signal.alarm(120)
    (tmp_path / "empty").mkdir()
    words = [word.replace("FOLDER", str(tmp_path / "empty")) for word in words]
    command = [sys.executable, "-m", "megatron_ssft.cli", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
