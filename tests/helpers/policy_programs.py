"""Policy learning as a program: command lines, what a run leaves behind, and its final weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.formats.metrics import MEASURED
from megatron_ssft.formats.run_folder import find_latest
from megatron_ssft.parallel.checkpoint.loading import load_checkpoint
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.signals import StopSignal
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from megatron_ssft.training.startup import complete_policy_values
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.processes import ranks_of_program, start_program
from tests.helpers.training_runs import assemble, weight_shards

start = functools.partial(start_program, "tools/train_gfpo.py")
ranks_of = functools.partial(ranks_of_program, "tools/train_gfpo.py")

TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
STEPS = 16
COMMON = (
    *("--lr", "3e-3", "--seed", "3", "--adam-eps", "1e-4", "--seq-length", "64", "--max-tokens-per-microbatch", "60"),
    *("--questions-per-step", "4", "--save-interval", "5", "--rescore-interval", "4", "--policy-interval", "7"),
)
ANCHOR = ("--objective", "gfpo-exact", "--anchor-completions", "10")


def flags(models, inputs, save, *more, kind="tied special", load=None, steps=STEPS):
    """The command line of tools/train_gfpo.py; `load`: default model 0 of its kind."""
    files = [text for name, path in inputs.items() for text in (f"--{name}", path)]
    start = ["--load", str(load or models / f"{kind} 0"), "--save", str(save), "--train-iters", str(steps)]
    common = COMMON[:-2] if "grpo" in more else COMMON
    return [*start, *files, *common, *more]


def run_body(argv):
    """tools/train_gfpo.py without a process of its own. Runs on every rank."""
    config, _ = parse_arguments("", GFPOConfig, argv, complete_policy_values)
    trainer = Trainer(config, initialize_topology(config.run))
    trainer.run(StopSignal())
    destroy_topology()


def final_weights(argv, runs):
    """The weight shards of each run's newest checkpoint. Runs on one rank."""
    config, _ = parse_arguments("", GFPOConfig, argv, complete_policy_values)
    topology, vocabulary = initialize_topology(config.run), build_vocabulary(config.run)
    shards = []
    for run in map(Path, runs):
        engine = Engine(config.run, topology, vocabulary.size, vocabulary.tags.row_ids)
        load_checkpoint(engine, run, find_latest(run), weights_only=True)
        shards.append(weight_shards(engine))
    return shards


def assert_same_weights(argv, *runs):
    ((first, *others),) = run_ranks(1, final_weights, argv, [str(run) for run in runs])
    expected = assemble([{"shards": first}])
    for other in others:
        for name, value in assemble([{"shards": other}]).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def logs(run):
    """metrics.jsonl without the times, and policy.jsonl, as text."""
    metrics = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        metrics.append(json.dumps({name: value for name, value in row.items() if name not in ("seconds", *MEASURED)}))
    return "\n".join(metrics), (run / "policy.jsonl").read_text()


def finished(run):
    path = run / "finished.json"
    return json.loads(path.read_text()) if path.exists() else None
