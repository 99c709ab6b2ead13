"""Bad input from the program's own entry: one line that says where and what, status 2, no traceback, nothing harmed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def flags(folder, **changes):
    """A complete command line for a tiny model on `folder`/train.jsonl; None leaves a flag out."""
    values = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "make_vocab_size_divisible_by": 8,
        "seq_length": 64,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 2,
        "lr": 1e-3,
        "seed": 1,
        "num_forking_tokens": 4,
        "matching_tokens": 4,
        "tokenizer_type": "CharTokenizer",
        "data_path": folder / "train.jsonl",
        "data_cache_path": folder / "cache",
    } | changes
    words = []
    for name, value in values.items():
        words += [] if value is None else ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return words


def row(number, **changes):
    traces = [{"text": f"{number}+{j}"} for j in range(1 + number % 3)]
    return {"id": f"q{number}", "question": f"what is {number}?", "traces": traces} | changes


def without(field):
    return {name: value for name, value in row(2).items() if name != field}


def write_rows(path, third=None):
    """Six questions, one a line; `third` replaces line 3 (text, bytes or a row)."""
    lines = [json.dumps(row(number)) for number in range(6)]
    if third is not None:
        lines[2] = third if isinstance(third, str | bytes) else json.dumps(third)
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def contents(folder):
    """Path -> content of every file."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- bodies that run in a process of their own -----------------------------------------------------------------------


def start(words, before_run=None):
    """Run pretrain_ssft.py with this command line; (status, stdout, stderr) down to the file descriptors."""
    import pretrain_ssft
    from megatron_ssft.cli.entry import run_command
    from megatron_ssft.training.trainer import Trainer

    if before_run is not None:
        run = Trainer.run
        Trainer.run = lambda trainer, *args: (before_run(trainer), run(trainer, *args))
    sys.argv = ["pretrain_ssft.py", *words]
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status = run_command(pretrain_ssft.main)
        except BaseException:  # noqa: BLE001 - what the interpreter would print, for the test to show
            status = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), kept):
                os.dup2(descriptor, number)
                os.close(descriptor)
        return status, *(os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err))


def start_each(command_lines):
    """One after the other in one process; all must fail before there is a model."""
    import torch.distributed as dist

    from megatron_ssft.parallel.topology import destroy_topology

    results = []
    for words in command_lines:
        results.append(start(words))
        if dist.is_initialized():
            destroy_topology()
    return results


def poison(trainer):
    """Put a NaN into the middle of the first layer's MLP."""
    import torch

    (weight,) = [
        p for name, p in trainer.engine.chunks[0].named_parameters() if "layers.0.mlp.linear_fc1.weight" in name
    ]
    with torch.no_grad():
        weight[3, 5] = float("nan")


def train_poisoned(words):
    return start(words, before_run=poison)


def save_poisoned(words, folder):
    """Train a step, break a weight, and save it as if nothing had happened."""
    from megatron_ssft.config.flags import parse_arguments
    from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
    from megatron_ssft.parallel.topology import initialize_topology
    from megatron_ssft.training.trainer import Trainer

    config, _ = parse_arguments("", words)
    trainer = Trainer(config, initialize_topology(config))
    trainer.train_step()
    poison(trainer)
    save_checkpoint(trainer.engine, Path(folder), trainer.iteration, trainer.state())


def complaint(result):
    """The one line of a run that was refused."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert "Traceback" not in out + err
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err.rstrip("\n")


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
        "load without checkpoint": ({"load": folder / "a folder"}, f"--load {folder}/a folder: ", "no checkpoint"),
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


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with train.jsonl and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "train.jsonl")
    status, _, err = run_ranks(1, start, flags(folder, save=folder / "run", save_interval=1))[0]
    assert status == 0, err
    return folder


def refused_on(run, **changes):
    """The complaint about a start with other flags, none of which may touch the run."""
    before = contents(run / "run")
    line = complaint(run_ranks(1, start, flags(run, **changes))[0])
    assert contents(run / "run") == before
    return line


def test_save_into_another_run(run):
    line = refused_on(run, save=run / "run")
    assert line.startswith(f"--save {run}/run: ") and "iter_0000002" in line and "--load" in line


def test_save_into_another_run_while_loading_a_third(run, tmp_path):
    assert refused_on(run, save=run / "run", load=tmp_path).startswith(f"--save {run}/run: ")


@pytest.mark.parametrize(
    ("changes", "inside"),
    [
        ({"hidden_size": 32}, "hidden_size 16"),
        ({"num_layers": 4}, "num_layers 2"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"num_forking_tokens": 5}, "forking tokens"),
        ({"forking_token_template": "<t{i}>"}, "forking tokens"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer"),
        ({"bf16": True}, "--bf16"),
        ({"seq_length": 32}, "data"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_load_with_other_settings(run, changes, inside):
    line = refused_on(run, load=run / "run", save=run / "run", **changes)
    assert line.startswith(f"--load {run}/run: ") and inside in line


def test_load_with_other_data(run):
    other = write_rows(run / "other.jsonl", row(2, question="what else?"))
    line = refused_on(run, load=run / "run", save=run / "run", data_path=other)
    assert line.startswith(f"--load {run}/run: ") and "data" in line and "--finetune" in line


def test_load_with_another_seed(run):
    line = refused_on(run, load=run / "run", save=run / "run", seed=2)
    assert "--seed 1" in line and "--seed 2" in line


def test_nan_in_a_checkpoint(run, tmp_path):
    run_ranks(1, save_poisoned, flags(run), str(tmp_path))
    before = contents(tmp_path)
    for more in ({"save": tmp_path}, {"finetune": True}):
        line = complaint(run_ranks(1, start, flags(run, load=tmp_path, **more))[0])
        assert line.startswith(f"{tmp_path}/iter_0000001: ")
        assert "NaN" in line and "layers.0.mlp.linear_fc1.weight" in line
    assert contents(tmp_path) == before


# -- numbers that go wrong while training ----------------------------------------------------------------------------


@pytest.mark.parametrize(("matching", "inside"), [("optimal", "cost"), ("fixed", "loss"), ("single", "loss")])
def test_nan_while_training(run, tmp_path, matching, inside):
    result = run_ranks(1, train_poisoned, flags(run, save=tmp_path / "new", matching=matching))[0]
    line = complaint(result)
    assert re.match(re.escape(f"{run}/train.jsonl:") + r"[1-6]: ", line)
    assert inside in line and ("finite" in line or "nan" in line)
    assert not list((tmp_path / "new").glob("iter_*"))
    assert (tmp_path / "new" / "metrics.jsonl").read_bytes() == b""


def test_nan_after_a_resume_leaves_the_checkpoint(run, tmp_path):
    """The logs are cut back to the checkpoint; the checkpoint itself stays loadable."""
    assert run_ranks(1, start, flags(run, save=tmp_path))[0][0] == 0
    before = {path: text for path, text in contents(tmp_path).items() if "iter_0000002" in path.parts}
    complaint(run_ranks(1, train_poisoned, flags(run, save=tmp_path, load=tmp_path, train_iters=4))[0])
    assert {path: text for path, text in contents(tmp_path).items() if "iter_0000002" in path.parts} == before
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]
    assert run_ranks(1, start, flags(run, save=tmp_path, load=tmp_path, train_iters=3))[0][0] == 0


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
