"""Compare packed with padded, concatenated and unshared sequences in one process: time, FLOPs, peak memory.

python benchmarks/layouts.py                                   # SmolLM2-135M's shape, random weights
python benchmarks/layouts.py --shape qwen2.5-1.5b --bf16       # on a GPU

Cost pass: every trace under every tag, `naive` being the padded layout (a sequence with its own prompt per pair).
Training: one forward and backward over the same traces. `efficiency` is the measured speed-up over that of the FLOPs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from pathlib import Path
from typing import TypedDict

import numpy as np
from harness import (
    SHAPES,
    interleaved,
    made_up_batch,
    matching_costs,
    mean_loss,
    peak_memory,
    ratio,
    report,
    start_trainer,
)

from megatron_ssft.records import Assignment, QuestionBatch
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.training.trainer import Trainer


class LayoutSettings(TypedDict, total=False):
    """Keys of the configuration that decide a sequence layout."""

    sequence_layout: str
    share_prompt: bool


LAYOUTS: dict[str, LayoutSettings] = {
    "packed": {"sequence_layout": "packed"},
    "concatenated": {"sequence_layout": "concatenated"},
    "packed, prompts repeated": {"sequence_layout": "packed", "share_prompt": False},
    "padded": {"sequence_layout": "padded"},
}


def planner_for(trainer: Trainer, layout: str, tokens: int, longest: int | None = None) -> Planner:
    """Plan in another sequence layout for the same engine, with the same number of tokens per microbatch.

    `longest`: sequence of a training batch, which decides how many padded rows those are.
    """
    run = trainer.config.run
    training = dataclasses.replace(run.training, max_tokens_per_microbatch=None, **LAYOUTS[layout])
    if layout != "padded":
        training.max_tokens_per_microbatch = tokens
    elif longest is not None:
        training.micro_batch_size = max(1, tokens // longest)
    return Planner(dataclasses.replace(run, training=training), trainer.vocabulary.size, 1, tokens)


def cost_pass(trainer: Trainer, prompt: int, matching_tokens: int, args: argparse.Namespace) -> dict[str, object]:
    """Time the cost pass, packed and padded, for questions whose traces are at least as long as what is matched on."""
    traces = [[matching_tokens] * args.traces] * args.questions
    batch = made_up_batch(np.random.default_rng(0), [prompt] * args.questions, traces, 256)
    tags = trainer.vocabulary.tags
    planned = {
        name: planner_for(trainer, name, args.tokens).plan_costs(batch, tags, matching_tokens)
        for name in ("packed", "padded")
    }
    costs: dict[str, list[np.ndarray]] = {}

    def score(name: str) -> None:
        costs[name] = matching_costs(trainer, planned[name])

    seconds = interleaved({name: functools.partial(score, name) for name in planned}, args.rounds)
    flops = {name: trainer.accountant.forward(each.plan) for name, each in planned.items()}
    speed_up, flop_ratio = ratio(seconds["padded"], seconds["packed"]), flops["padded"] / flops["packed"]
    return {
        "prompt": prompt,
        "T_r": matching_tokens,
        "naive_s": statistics.median(seconds["padded"]),
        "ours_s": statistics.median(seconds["packed"]),
        "speed-up": speed_up,
        "FLOP_ratio": flop_ratio,
        "efficiency": speed_up / flop_ratio,
        "largest_difference": max(float(abs(a / b - 1).max()) for a, b in zip(costs["packed"], costs["padded"])),
    }


def training_batch(args: argparse.Namespace) -> QuestionBatch:
    """Make up a batch of traces whose lengths are heavy-tailed, like those of real ones."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(args.trace_tokens) - 0.18, 0.6, (args.questions, args.traces)), 8, None)
    lengths = np.minimum(lengths, args.tokens - args.prompt - 1).astype(int).tolist()
    return made_up_batch(rng, [args.prompt] * args.questions, lengths, 256)


def training(trainer: Trainer, args: argparse.Namespace) -> list[dict[str, object]]:
    """Time a step without the optimizer, in every sequence layout."""
    batch = training_batch(args)
    assignments = [Assignment(tuple(range(s.num_traces))) for s in batch.sets]
    longest = args.prompt + 1 + max(len(c) for s in batch.sets for c in s.completion_ids)
    planners = {name: planner_for(trainer, name, args.tokens, longest) for name in LAYOUTS}
    tags = trainer.vocabulary.tags
    planned = {name: planner.plan_sequences(batch, assignments, tags) for name, planner in planners.items()}
    losses: dict[str, float] = {}

    def step(name: str) -> None:
        losses[name] = trainer.engine.train([mean_loss(planned[name], 1000.0)], lr=0.0).loss

    seconds = interleaved({name: functools.partial(step, name) for name in planned}, args.rounds)
    rows = []
    for name, each in planned.items():
        plan = each.plan
        useful = sum(s.num_tokens for s in plan.sequences)
        rows.append(
            {
                "layout": name,
                "seconds": statistics.median(seconds[name]),
                "over_packed": ratio(seconds[name], seconds["packed"]),
                "tokens_computed": plan.size.tokens,
                "tokens_in_sequences": useful,
                "tokens/s": useful / statistics.median(seconds[name]),
                "peak_MiB": peak_memory(functools.partial(step, name)) / 2**20,
                "loss": losses[name],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="random weights [%(default)s]")
    parser.add_argument("--layers", type=int, help="fewer layers of that shape, to be done sooner")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--matching-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--traces", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="prompt of the training step [%(default)s]")
    parser.add_argument("--trace-tokens", type=int, default=256, help="mean trace of the training step [%(default)s]")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a microbatch [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = SHAPES[args.shape] | ({"num_layers": args.layers} if args.layers else {})
    shape |= {"bf16": args.bf16, "attention_backend": args.attention_backend}
    trainer = start_trainer(shape | {"seq_length": args.tokens, "micro_batch_size": 1})
    rows = [cost_pass(trainer, prompt, t, args) for prompt in args.prompts for t in args.matching_tokens]
    report(f"Cost pass, {args.shape}, {shape['num_layers']} layers, 6 tags x {args.traces} traces", rows, args.json)
    report("Training step", training(trainer, args), args.json and args.json.with_suffix(".training.json"))


if __name__ == "__main__":
    main()
