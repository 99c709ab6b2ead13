"""Steps of small runs that are counted: around real tensors on real ranks, and on simulated ranks in one process."""

from __future__ import annotations

import functools
import random

from megatron_ssft.config import GFPOConfig, SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.model.initialization import initialize_weights
from megatron_ssft.parallel.simulated.counters import Counters
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.training.rehearsal import count_steps, simulate_run
from tests.helpers.training_runs import write_rows

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "make_vocab_size_divisible_by": 2,
}
VALUES = MODEL | {
    "seq_length": 200,
    "micro_batch_size": 1,
    "global_batch_size": 12,
    "train_iters": 3,
    "lr": 1e-3,
    "seed": 3,
    "tokenizer_type": "CharTokenizer",
    "num_forking_tokens": 4,
    "matching_tokens": 16,
}
"""Of a run of SSFT."""


def write_sets(folder, questions=12, letters=160):
    """Questions with four traces of so many letters, or down to a quarter of it; the values that name them."""
    rng = random.Random(1)
    rows = [
        {
            "id": f"q{i}",
            "question": "what is " + "x" * rng.randint(1, 20),
            "traces": [
                {"text": "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(letters // 4, letters)))}
                for _ in "1234"
            ],
        }
        for i in range(questions)
    ]
    return {"data_path": [write_rows(folder / "sets.jsonl", rows)], "data_cache_path": str(folder / "cache")}


def config_of(values):
    """A run of policy learning where the values have an objective, else one of SSFT."""
    return build_config(values, GFPOConfig if "objective" in values else SSFTConfig)


def count_real(runs):
    """The first step of each of these runs, around real tensors. Runs on every rank."""
    steps = []
    for values in runs:
        config = config_of(values)
        topology = initialize_topology(config.run)
        with Counters() as counters:
            fill = functools.partial(_fill, config=config)
            steps.append(count_steps(config, topology, counters, 1, fill=fill))
        destroy_topology()
    return steps


def _fill(engine, config):
    initialize_weights(engine.chunks, config.run)


def simulate_ranks(runs, kind="gpu"):
    """The first step of each (values, world size, rank), simulated one after the other in this process."""
    return [simulate_run(config_of(values), world_size, rank, kind=kind) for values, world_size, rank in runs]
