"""Memory, FLOPs, messages and waits of one step of large models, rank by rank, on simulated GPUs.

Each row is one rank of a job: the real step of SSFT (cost pass, training pass, optimizer) on 32 made-up traces, without
a GPU and without its memory. Beside it stands what Megatron-LM's theoretical memory report says of such a job.

    python benchmarks/simulated_step.py                    # all rows, each in a process of its own
    python benchmarks/simulated_step.py --row 32b-pp1 --sites
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import SHAPES, made_up_batch, mean_loss, report

from megatron_ssft.config import RunConfig, SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.simulated.simulate import CountedEngine, simulate
from megatron_ssft.records import Assignment, ForkingTokens, PlannedBatch
from megatron_ssft.scheduling.planner import Planner

GIB = 2**30
PIPELINE: dict[str, object] = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4}
FULL: dict[str, object] = {"recompute_granularity": "full"}
ROWS: dict[str, tuple[str, int, int, dict[str, object]]] = {
    "32b-pp4-first": ("qwen2.5-32b", 64, 0, PIPELINE | FULL),
    "32b-pp4-last": ("qwen2.5-32b", 64, 63, PIPELINE | FULL),
    "32b-pp1": ("qwen2.5-32b", 64, 0, {"tensor_model_parallel_size": 8} | FULL),
    "32b-no-recompute": ("qwen2.5-32b", 64, 0, PIPELINE),
    "7b": ("qwen2.5-7b", 8, 0, {"tensor_model_parallel_size": 4, "seq_length": 16384} | FULL),
}
"""Name -> (shape, ranks of the job, this rank, configuration)."""
QUESTIONS, TRACES, MEAN = 8, 4, 30000


def job_of(row: str) -> tuple[SSFTConfig, int, int]:
    """(configuration, ranks of the job, this rank)."""
    shape, world_size, rank, changes = ROWS[row]
    values: dict[str, object] = {
        "seq_length": 32768, "global_batch_size": QUESTIONS * TRACES, "train_iters": 756, "lr": 1e-5, "bf16": True,
        "sequence_parallel": True, "use_distributed_optimizer": True, "matching_tokens": 1000, "num_forking_tokens": 6,
        "tokenizer_type": "CharTokenizer", "data_path": ["made up"],
    }  # fmt: skip
    return build_config(values | SHAPES[shape] | changes, SSFTConfig), world_size, rank


def plans_of(config: RunConfig, num_ranks: int) -> tuple[PlannedBatch, PlannedBatch, ForkingTokens]:
    """(cost pass, training pass, tags) of long, unequal traces."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "the shapes have one"
    tags = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 7)), tuple((152000 + i,) for i in range(6)), "special")
    rng, longest = np.random.default_rng(0), config.tokenizer.seq_length - 400
    drawn = rng.lognormal(np.log(MEAN) - 0.18, 0.6, (QUESTIONS, TRACES))
    lengths: list[list[int]] = np.clip(drawn, 64, longest).astype(int).tolist()
    batch = made_up_batch(rng, rng.integers(80, 300, QUESTIONS).tolist(), lengths, 151000)
    planner = Planner(config, vocab_size, num_ranks)
    assignments = [Assignment(tuple(range(TRACES)))] * QUESTIONS
    return planner.plan_costs(batch, tags, 1000), planner.plan_sequences(batch, assignments, tags), tags


def theoretical_report(config: RunConfig, dp_size: int, tokens: int, microbatches: int) -> tuple[float, float]:
    """(bytes of weights, gradients and optimizer, those with activations) as Megatron-LM's theoretical memory report.

    It speaks of the shard with the most parameters and of the first stage. A parameter takes 18 bytes, or 6 + 12 / DP
    with the distributed optimizer. A layer keeps 18 h + 4 ffn bytes per token, as many microbatches as there are
    stages are under way, and without stages the logits are there in float32. Everything is divided by TP. For full
    recompute the report says nothing: there a layer keeps its input, 2 h bytes per token (arXiv:2205.05198, section 5).

    Args:
        tokens: sequence length times micro-batch size there; here the longest microbatch.
        microbatches: of a step, on one data-parallel rank.
    """
    model, parallel = config.model, config.parallel
    assert model.num_layers and model.hidden_size and model.ffn_hidden_size and model.vocab_size, "filled in"
    assert model.kv_channels and model.num_attention_heads and model.num_query_groups, "filled in"
    h, ffn, layers, vocab = model.hidden_size, model.ffn_hidden_size, model.num_layers, model.vocab_size
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    query, keys = model.kv_channels * model.num_attention_heads, model.kv_channels * model.num_query_groups
    layer = h * (2 * query + 2 * keys) + 3 * h * ffn + 2 * h  # SwiGLU, RMSNorm; no biases
    tables = 2 if stages == 1 and model.untie_embeddings_and_output_weights else 1
    parameters = ((layers * layer + h) / stages + tables * h * vocab) / tp
    state = parameters * (6 + 12 / dp_size if parallel.use_distributed_optimizer else 18)
    kept = 2 * h if parallel.recompute_granularity == "full" else 18 * h + 4 * ffn
    under_way: float = tokens * (layers * kept + stages * (8 + h))  # all stages' layers: L / PP of PP microbatches
    virtual = config.virtual_pipeline_size
    under_way *= 1 + (stages - 1) / (stages * virtual) if virtual else min(1, microbatches / stages)
    logits = 4 * tokens * (h + vocab) if stages == 1 else 0
    return state, state + (under_way + logits) / tp


def formulas_of(row: str) -> tuple[float, float]:
    """What the formula says of a row."""
    config, world_size, rank = job_of(row)
    run = config.run
    dp_size = world_size // run.parallel.model_parallel_size
    _, train, _ = plans_of(run, dp_size)
    microbatches = train.plan.ranks[rank // run.parallel.tensor_model_parallel_size % dp_size]
    return theoretical_report(run, dp_size, max(each.size.tokens for each in microbatches), len(microbatches))


def simulate_row(row: str) -> tuple[dict[str, object], SimulatedStep]:
    """A row of the table, and all that was counted."""
    config, world_size, rank = job_of(row)
    run = config.run
    num_ranks = world_size // run.parallel.model_parallel_size
    costs, train, tags = plans_of(run, num_ranks)

    def step_on(engine: CountedEngine) -> None:
        engine.score(costs).nll_sums()
        engine.train([mean_loss(train, 1000.0)], lr=1e-5)

    begin = time.perf_counter()
    assert run.model.vocab_size is not None
    step = simulate(run, world_size, rank, run.model.vocab_size, tags.row_ids, step_on)
    seconds = time.perf_counter() - begin
    training = step.section("training")
    state, peak = formulas_of(row)
    waits = sum(wait.count for section in step.sections for wait in section.waits)
    return {
        "rank": row,
        "between_steps_GiB": step.between_steps / GIB,
        "formula_GiB": state / GIB,
        "peak_GiB": step.peak / GIB,
        "formula_peak_GiB": peak / GIB,
        "PFLOP": (training.flops.model + training.flops.recomputed) / 1e15,
        "inside_nodes_GB": traffic(step, between=False) / 1e9,
        "between_nodes_GB": traffic(step, between=True) / 1e9,
        "waits": waits,
        "seconds": seconds,
        "RAM_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }, step


def traffic(step: SimulatedStep, between: bool) -> int:
    """Bytes of the step's messages inside nodes or between them."""
    messages = (message for section in step.sections for message in section.collectives)
    return sum(message.bytes for message in messages if message.between_nodes == between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, help="one rank, in this process; prints its figures as JSON")
    parser.add_argument("--sites", action="store_true", help="with --row: print everything that was counted")
    parser.add_argument("--formulas", action="store_true", help="print the formula's columns only, as JSON")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.formulas:
        print(json.dumps({row: [size / GIB for size in formulas_of(row)] for row in ROWS}, indent=1))
        return
    if args.row is not None:
        row, step = simulate_row(args.row)
        print(json.dumps(dataclasses.asdict(step) if args.sites else row, indent=1))
        return
    rows = []
    for name in ROWS:
        command = [sys.executable, "-W", "ignore", __file__, "--row", name]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    report("One step of one rank, simulated", rows, args.json)


if __name__ == "__main__":
    main()
