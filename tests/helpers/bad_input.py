"""`train` on input that is at fault: command lines, rows, and the program in a process of the test's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.helpers.captured import run_captured


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
    """Run `train` with this command line; (status, stdout, stderr) down to the file descriptors."""
    from megatron_ssft.cli import train
    from megatron_ssft.cli.entry import run_command
    from megatron_ssft.training.trainer import Trainer

    if before_run is not None:
        run = Trainer.run
        Trainer.run = lambda trainer, *args: (before_run(trainer), run(trainer, *args))
    sys.argv = ["megatron-ssft train", *words]
    return run_captured(lambda: run_command(train.main))


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
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import parse_arguments
    from megatron_ssft.parallel.checkpoint import run_checkpoint
    from megatron_ssft.parallel.topology import initialize_topology
    from megatron_ssft.training.trainer import Trainer

    config, _ = parse_arguments("", SSFTConfig, words)
    trainer = Trainer(config, initialize_topology(config.run))
    trainer.train_step()
    poison(trainer)
    run_checkpoint.find_nonfinite = lambda engine: None  # as older versions saved it
    run_checkpoint.save_checkpoint(trainer.engine, Path(folder), trainer.iteration, trainer.state())


def complaint(result):
    """The one line of a run that was refused."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert "Traceback" not in out + err
    # a CUDA build of torch on a machine without a GPU
    err = re.sub(r"^W\d{4} .*/torch/.*No CUDA runtime is found.*\n", "", err, flags=re.MULTILINE)
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err.rstrip("\n")
