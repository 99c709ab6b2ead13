"""Steps of small runs that are counted: around real tensors on real ranks, and on simulated ranks in one process."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from megatron_ssft.config import GFPOConfig, SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.checkpoint.checkpoint_size import measure_size
from megatron_ssft.parallel.checkpoint.sharded_state import sharded_state
from megatron_ssft.parallel.checkpoint.writer import plan_save
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_weights
from megatron_ssft.parallel.optimizer import allocate_state
from megatron_ssft.parallel.simulated.counters import Counters
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from megatron_ssft.training.rehearsal import count_steps, simulate_run
from tests.helpers.policy_runs import run_values, write_inputs
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


def write_policy(folder):
    """Values of a run of policy learning, but for its objective, with the files that they name."""
    inputs = write_inputs(folder)
    return run_values(folder, "untied special", inputs, folder / "run", questions_per_step=6) | MODEL


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


def count_saved(runs):
    """(bytes of the tensors that this rank writes of a checkpoint, bytes of all of it), of each run. Collective."""
    told = []
    for values in runs:
        config = config_of(values)
        topology = initialize_topology(config.run)
        vocabulary = build_vocabulary(config.run, config.start)
        engine = Engine(config.run, topology, vocabulary.size, vocabulary.tags.row_ids)
        initialize_weights(engine.chunks, config.run)
        engine.start()
        allocate_state(engine.optimizer)
        state, _ = save_preprocess(sharded_state(engine, is_loading=False, weights_only=False), True)
        with tempfile.TemporaryDirectory() as folder:
            content = plan_save(state, Path(folder), is_copied=False).content
        written = sum(tensor.nbytes for tensors in content for tensor in tensors)
        told.append((written, measure_size(engine).whole))
        destroy_topology()
    return told
