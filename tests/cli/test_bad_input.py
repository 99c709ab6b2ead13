"""Bad input from the program's own entry: one line that says where and what, status 2, no traceback, nothing harmed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.bad_input import complaint, contents, flags, row, start_each, without, write_rows
from tests.helpers.distributed import run_ranks
from tests.helpers.paths import ROOT

# -- data ------------------------------------------------------------------------------------------------------------

BAD_THIRD_LINE = {
    "broken JSON": ('{"id": "q2", "question": ', "not valid JSON"),
    "two objects": (json.dumps(row(2)) * 2, "not valid JSON"),
    "no object": ("[1, 2]", "JSON object"),
    "no UTF-8": (b'{"id": "\xff\xfe"}', "UTF-8"),
    "binary": (bytes(range(0, 10)) + b"\x80\x81", "UTF-8"),
    "no id": (without("id"), "'id'"),
    "no prompt": (without("question"), "'prompt'"),
    "two prompts": (row(2, prompt="and this?"), "'question'"),
    "empty question": (row(2, question="  "), "'question'"),
    "no traces": (without("traces"), "'traces'"),
    "empty traces": (row(2, traces=[]), "'traces' is empty"),
    "empty text": (row(2, traces=[{"text": "a"}, {"text": ""}]), "'text' of trace 2"),
    "no text": (row(2, traces=[{"source": "human"}]), "'text' of trace 1"),
    "traces are texts": (row(2, traces=["a", "b"]), "trace 1"),
    "duplicate id": (row(2, id="q0"), "'q0' is already used at"),
    "M > N": (row(2, traces=[{"text": str(j)} for j in range(5)]), "only 4 forking tokens"),
    "long prompt": (row(2, question="x" * 64), "--seq-length 64"),
}


@pytest.fixture(scope="module")
def bad_rows(tmp_path_factory):
    """Name -> (file, its content before, result of starting on it)."""
    folder = tmp_path_factory.mktemp("rows")
    files = {
        name: write_rows(folder / f"bad {i}.jsonl", third)
        for i, (name, (third, _)) in enumerate(BAD_THIRD_LINE.items())
    }
    before = {name: path.read_bytes() for name, path in files.items()}
    words = [flags(folder, data_path=path, save=folder / "run") for path in files.values()]
    results = run_ranks(1, start_each, words)[0]
    assert not (folder / "run").exists()
    return {name: (files[name], before[name], result) for name, result in zip(files, results)}


@pytest.mark.parametrize("name", BAD_THIRD_LINE)
def test_bad_row(bad_rows, name):
    path, before, result = bad_rows[name]
    line = complaint(result)
    assert line.startswith(f"{path}:3: ")
    assert BAD_THIRD_LINE[name][1] in line
    assert path.read_bytes() == before


def test_every_bad_row_is_reported_in_one_go(tmp_path):
    lines = [json.dumps(row(number)) for number in range(40)]
    lines[3], lines[7], lines[8] = "{", json.dumps(without("traces")), json.dumps(row(0))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "many.jsonl").write_text("{\n" * 50)
    few, many = run_ranks(1, start_each, [flags(tmp_path), flags(tmp_path, data_path=tmp_path / "many.jsonl")])[0]
    assert few[0] == many[0] == 2
    places = [re.match(re.escape(f"{tmp_path}/train.jsonl:") + r"(\d+): ", line) for line in few[2].splitlines()]
    assert [int(place[1]) for place in places] == [4, 8, 9]
    assert len(many[2].splitlines()) == 21 and "30 more" in many[2].splitlines()[-1]


def write_files(folder):
    """What the cases below name."""
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n \n\n")
    (folder / "no model").write_bytes(b"not a SentencePiece model")
    (folder / "a folder").mkdir()
    write_rows(folder / "train.jsonl")
    write_rows(folder / "eval bad.jsonl", "{")


def file_cases(folder):
    """Name -> (changed flags, how the line must start, what it must contain)."""
    held_out, sentencepiece = folder / "eval bad.jsonl", {"tokenizer_type": "SentencePieceTokenizer"}
    hugging_face = {"tokenizer_type": "HuggingFaceTokenizer"}

    def model(path):
        return {"tokenizer_model": path}, f"--tokenizer-model {path}: "

    absent, no_model, empty = model(folder / "absent"), model(folder / "no model"), model(folder / "a folder")
    return {
        "empty file": ({"data_path": folder / "empty.jsonl"}, f"{folder}/empty.jsonl:1: ", "empty"),
        "blank file": ({"data_path": folder / "blank.jsonl"}, f"{folder}/blank.jsonl:1: ", "empty"),
        "missing file": ({"data_path": folder / "absent.jsonl"}, f"{folder}/absent.jsonl:1: ", "No such file"),
        "folder for file": ({"data_path": folder / "a folder"}, f"{folder}/a folder:1: ", "directory"),
        "bad held-out file": ({"eval_data_path": held_out}, f"{held_out}:3: ", "JSON"),
        "missing held-out": ({"eval_data_path": folder / "absent.jsonl"}, f"{folder}/absent.jsonl:1: ", "No such file"),
        "M > global batch": ({"global_batch_size": 2}, f"{folder}/train.jsonl:3: ", "--global-batch-size 2"),
        "filter keeps nothing": ({"trace_filter": "source=nobody"}, "--trace-filter source=nobody", "filter"),
        "bad filter": ({"trace_filter": "length>3"}, "--trace-filter", "length"),
        "no SentencePiece file": (sentencepiece | absent[0], absent[1], "SentencePiece"),
        "no SentencePiece model": (sentencepiece | no_model[0], no_model[1], "SentencePiece"),
        "folder for model": (sentencepiece | empty[0], empty[1], "SentencePiece"),
        "no Hugging Face folder": (hugging_face | absent[0], absent[1], ""),
        "empty Hugging Face folder": (hugging_face | empty[0], empty[1], ""),
        "file for Hugging Face folder": (hugging_face | no_model[0], no_model[1], ""),
        "unknown token to copy": (
            {"forking_token_init": "copy:<no such token>"},
            "--forking-token-init copy:",
            "token",
        ),
        "cache cannot be made": (
            {"data_cache_path": folder / "no model" / "x"},
            f"{folder}/no model/x: ",
            "--data-cache-path",
        ),
        "save is a file": ({"save": folder / "no model"}, f"--save {folder}/no model", ""),
        "load is absent": ({"load": folder / "absent"}, f"--load {folder}/absent: ", "no such folder"),
        "load is a file": ({"load": folder / "no model"}, f"--load {folder}/no model: ", ""),
        "load without checkpoint": (
            {"load": folder / "a folder"},
            f"--load {folder}/a folder: ",
            "is empty; give a run folder",
        ),
        "TransformerEngine without CUDA": ({"transformer_impl": "transformer_engine"}, "--transformer-impl", "local"),
        "odd number of ranks": ({"tensor_model_parallel_size": 2}, "1 processes", "multiple of 2"),
        "unknown setting": ({"matching": "greedy"}, "--matching greedy", "optimal"),
    }


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Name -> (case, result); what the cases name is checked to be unchanged."""
    folder = tmp_path_factory.mktemp("files")
    cases = file_cases(folder)
    write_files(folder)
    before = contents(folder)
    results = run_ranks(1, start_each, [flags(folder, **changes) for changes, _, _ in cases.values()])[0]
    after = contents(folder)
    assert {path: text for path, text in after.items() if "cache" not in path.parts} == before
    return {name: (cases[name], result) for name, result in zip(cases, results)}


@pytest.mark.parametrize("name", file_cases(Path()))
def test_bad_file_or_flag(refusals, name):
    (_, beginning, inside), result = refusals[name]
    line = complaint(result)
    assert line.startswith(beginning) and inside in line


# -- the real program ------------------------------------------------------------------------------------------------


def program(launcher, words):
    command = [sys.executable, *launcher, str(ROOT / "pretrain_ssft.py"), *words]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_program_on_broken_json(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", '{"id": ')
    done = program([], flags(tmp_path))
    assert complaint((done.returncode, done.stdout, done.stderr)).startswith(f"{path}:3: ")
    assert done.stdout == ""


@pytest.mark.slow
def test_two_ranks_say_it_once(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", '{"id": ')
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = program(launcher, flags(tmp_path, tensor_model_parallel_size=2))
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(f"{path}:3: ") == 1
    assert 'pretrain_ssft.py", line' not in done.stdout + done.stderr
