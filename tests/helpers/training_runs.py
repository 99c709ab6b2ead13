"""Small training runs for the tests: data, configurations, and a body that trains and tells everything it saw."""

from __future__ import annotations

import json
import random

import numpy as np
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.formats.metrics import MEASURED
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.training.trainer import Trainer

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
BASE = {
    **MODEL,
    "seq_length": 64,
    "micro_batch_size": 2,
    "global_batch_size": 12,
    "train_iters": 5,
    "lr": 1e-2,
    "seed": 3,
    "init_method_std": 0.1,  # larger than usual, so that costs differ by more than rounding from the first step on
    "tokenizer_type": "CharTokenizer",
    "num_forking_tokens": 5,
    "matching_tokens": 6,
    "matching_tokens_per_microbatch": 300,
}


TIMES = (*MEASURED, "matching_seconds", "solving_seconds", "exact_matching_seconds", "seconds")
"""Figures of a step that differ when it is made again."""


def flags(values):
    """Configuration values as command-line flags."""
    out = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        out += [flag] if value is True else [flag, str(value)]
    return out


def logs(run):
    """metrics.jsonl without the times, and assignments.jsonl, as text."""
    metrics = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        metrics.append(json.dumps({k: v for k, v in row.items() if k not in TIMES}))
    return "\n".join(metrics), (run / "assignments.jsonl").read_text()


def write_rows(path, rows):
    """A JSONL file of rows; returns its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_rows(count=30, max_traces=5, seed=0):
    """Questions with 1 to `max_traces` traces of very different lengths."""
    rng = random.Random(seed)
    return [
        {
            "id": f"q{i}",
            "question": f"{rng.randint(0, 99)}+{rng.randint(0, 9)}",
            "traces": [
                {"text": "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(2, 30))) + "!", "source": f"t{j}"}
                for j in range(rng.randint(1, max_traces))
            ],
        }
        for i in range(count)
    ]


def train_and_tell(values):
    """Train; return losses, gradient norms, costs, tags and this rank's weight shards. Runs on every rank."""
    config = build_config(values, SSFTConfig)
    topology = initialize_topology(config.run)
    trainer = Trainer(config, topology)
    history = []
    for _ in range(config.run.training.train_iters):
        decision, row = trainer.train_step()
        history.append(
            {
                "loss": row["loss"],
                "grad_norm": row["grad_norm"],
                "tokens": row["trained_tokens"],
                "pipeline_idle_share": row.get("pipeline_idle_share"),
                "ids": [s.id for s in decision.batch.sets],
                "tags": [a.tags for a in decision.assignments],
                "costs": [a.cost_NM for a in decision.assignments],
            }
        )
    shards = weight_shards(trainer.engine)
    destroy_topology()
    return {"history": history, "shards": shards}


def weight_shards(engine):
    """(name, layer, global shape, offset, values) of every weight shard on this rank, tag rows folded in."""
    engine.fold_forking_rows()
    shards = []
    for chunk in engine.chunks:
        for entry in chunk.sharded_state_dict().values():
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                if isinstance(part, ShardedTensor) and "forking_rows" not in part.key:
                    lead = part.prepend_axis_num
                    name = part.key + "".join(f"/{i}" for i in part.global_offset[:lead])
                    shape, offset = part.global_shape[lead:], part.global_offset[lead:]
                    shards.append((name, tuple(shape), tuple(offset), part.data.detach().float().numpy().copy()))
    return shards


def assemble(results):
    """Whole weights by name from the shards of all ranks; replicas must agree to the bit."""
    whole = {}
    for result in results:
        for name, shape, offset, values in result["shards"]:
            full = whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
            place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape))
            known = full[place]
            seen = ~np.isnan(known)
            np.testing.assert_array_equal(known[seen], values[seen], err_msg=f"replicas of {name} differ")
            full[place] = values
    for name, full in whole.items():
        assert not np.isnan(full).any(), f"{name} has holes"
    return whole
