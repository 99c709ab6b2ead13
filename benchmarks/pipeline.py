"""How much of a pipeline is idle in a step of long traces, before and after streams are split for it; nothing executed.

python benchmarks/pipeline.py
python benchmarks/pipeline.py --chunks 2 --repeats 20 --json pipeline.json

A step has 32 traces, 4 per question, of lognormal length with a mean of 8,000 tokens and at most 32,000, behind
prompts of 200 tokens. Work is counted in FLOPs of a 32B-parameter shape, the backward pass three times the forward
(full recompute), and time by walking through the schedule (`megatron_ssft/scheduling/pipeline_time.py`). What the
columns (and the keys of the JSON) say, the mean over the repetitions:

streams   per data-parallel rank.
idle      share of the stages' time, on all ranks, in which they wait for each other or for the rank that takes longest.
time      of the rank that takes longest, over that before.
repeated  work that prompts and tags computed again add, over the work before.
bound     max(work before / ranks / stages, the longest trace through all stages) over the time after: 1 is the least
          time that any plan could take.

Training before: as few streams as the token budget allows, the heaviest first. Cost pass before: four streams per
stage, if they have 1,024 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_ssft.config import ModelConfig
from megatron_ssft.records import (
    Assignment,
    ForkingTokens,
    MicrobatchPlan,
    QuestionBatch,
    QuestionVisit,
    TokenizedSet,
)
from megatron_ssft.scheduling import StreamLimits, WorkModel, plan_cost_streams, plan_train_streams
from megatron_ssft.scheduling.pipeline_time import Pipeline, pipeline_time

SHAPE = ModelConfig(
    num_layers=64, hidden_size=5120, num_attention_heads=40, num_query_groups=8, kv_channels=128, ffn_hidden_size=27648
)
VOCABULARY = 152064
TAGS = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 7)), tuple((VOCABULARY + i,) for i in range(6)), "special")
WORK = WorkModel.for_model(SHAPE, VOCABULARY)
STAGES, RANKS = (2, 4, 8), (1, 2, 4, 8)
TRACES, SIGMA = 4, 0.6
SHORTEST, LONGEST = 64, 32000
BACKWARD_RATIO = 3.0
COLUMNS = ("streams_before", "streams", "idle_before", "idle", "time", "repeated", "bound")


def draw(arguments: argparse.Namespace, seed: Sequence[int]) -> tuple[QuestionBatch, list[Assignment]]:
    """A step of random questions, a tag of its own for each trace of a question."""
    rng = np.random.default_rng(seed)
    mu = math.log(arguments.mean_tokens) - SIGMA**2 / 2
    sets = []
    for k in range(arguments.questions):
        lengths = np.clip(rng.lognormal(mu, SIGMA, TRACES), SHORTEST, LONGEST).astype(int)
        completions = tuple(rng.integers(0, 9, length, dtype=np.int32) for length in lengths)
        prompt = np.zeros(arguments.prompt_tokens, dtype=np.int32)
        sets.append(TokenizedSet(f"q{k}", "", k + 1, prompt, completions, (None,) * TRACES))
    visits = tuple(QuestionVisit(k, 0) for k in range(len(sets)))
    return QuestionBatch(visits, tuple(sets)), [Assignment(tuple(range(TRACES)))] * len(sets)


def longest_time(plan: MicrobatchPlan, pipeline: Pipeline) -> float:
    """Time of the rank that takes longest, with stages that do nothing but this."""
    works = [[WORK.of(microbatch.size) for microbatch in rank] for rank in plan.ranks]
    return max(pipeline_time(of, pipeline.stages, pipeline.chunks, pipeline.backward_ratio).time for of in works)


def compare(before: MicrobatchPlan, after: MicrobatchPlan, pipeline: Pipeline, heaviest: float) -> dict[str, float]:
    """The figures of a step. `heaviest`: work of the heaviest sequence alone."""
    first, second = longest_time(before, pipeline), longest_time(after, pipeline)
    both = 1 + pipeline.backward_ratio
    busy_before, busy = (WORK.of(p.size) * both / pipeline.stages / len(p.ranks) for p in (before, after))
    return {
        "streams_before": float(np.mean([len(rank) for rank in before.ranks])),
        "streams": float(np.mean([len(rank) for rank in after.ranks])),
        "idle_before": 1 - busy_before / first,
        "idle": 1 - busy / second,
        "time": second / first,
        "repeated": busy / busy_before - 1,
        "bound": min(1.0, max(busy_before, heaviest * both) / second),
    }


def measure(arguments: argparse.Namespace, stages: int, ranks: int) -> dict[str, dict[str, float]]:
    """The mean figures of training and of the cost pass in one parallel layout."""
    chunks = arguments.chunks
    plain = StreamLimits(ranks, arguments.max_tokens, group_size=stages if chunks > 1 else 1, equal_counts=chunks > 1)
    train, cost = Pipeline(stages, chunks, BACKWARD_RATIO), Pipeline(stages, chunks, 0.0)
    figures: dict[str, list[dict[str, float]]] = {"training": [], "cost pass": []}
    for repeat in range(arguments.repeats):
        batch, assignments = draw(arguments, (arguments.seed, repeat))
        limits = dataclasses.replace(plain, pipeline=train)
        before, after = (plan_train_streams(batch, assignments, TAGS, of, WORK) for of in (plain, limits))
        figures["training"].append(compare(before, after, train, _heaviest(before)))
        limits = dataclasses.replace(plain, pipeline=cost)
        after = plan_cost_streams(batch, arguments.matching_tokens, TAGS, limits, WORK)
        before = four_per_stage(batch, arguments.matching_tokens, plain, stages)
        figures["cost pass"].append(compare(before, after, cost, _heaviest(before)))
    return {name: {key: float(np.mean([of[key] for of in rows])) for key in COLUMNS} for name, rows in figures.items()}


def four_per_stage(batch: QuestionBatch, matching_tokens: int, limits: StreamLimits, stages: int) -> MicrobatchPlan:
    """The cost pass by a fixed number of streams."""
    plan = plan_cost_streams(batch, matching_tokens, TAGS, limits, WORK)
    number = min(4 * stages, plan.size.tokens // (limits.num_ranks * limits.smallest_stream))
    if number > min(map(len, plan.ranks)):
        limits = dataclasses.replace(limits, min_microbatches=number)
        plan = plan_cost_streams(batch, matching_tokens, TAGS, limits, WORK)
    return plan


def _heaviest(plan: MicrobatchPlan) -> float:
    alone = ((s.num_tokens, s.num_scored) for s in plan.sequences)
    return max(WORK.token * n + WORK.pair * n * (n + 1) / 2 + WORK.scored * scored for n, scored in alone)


def show(console: Console, title: str, rows: dict[tuple[int, int], dict[str, float]]) -> None:
    """Print a table, a row per parallel layout."""
    table = Table(title=title, width=80)
    for name in ("PP", "DP", "streams", "idle before", "after", "time", "repeated", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for (stages, ranks), of in rows.items():
        table.add_row(
            str(stages),
            str(ranks),
            f"{of['streams_before']:.1f} to {of['streams']:.1f}",
            f"{of['idle_before']:.1%}",
            f"{of['idle']:.1%}",
            f"{of['time']:.2f}",
            f"{of['repeated']:.1%}",
            f"{of['bound']:.2f}",
        )
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="random steps for each parallel layout [50]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=1, help="model chunks per stage (virtual pipeline) [1]")
    parser.add_argument("--questions", type=int, default=8, help="of 4 traces each [8]")
    parser.add_argument("--mean-tokens", type=float, default=8000.0, help="of a trace [8000]")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--matching-tokens", type=int, default=1000, help="of the cost pass [1000]")
    parser.add_argument("--max-tokens", type=int, default=32768, help="in a token stream [32768]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    arguments = parser.parse_args()
    counts = (arguments.repeats, arguments.chunks, arguments.questions, arguments.prompt_tokens, arguments.max_tokens)
    if min(*counts, arguments.mean_tokens, arguments.matching_tokens) < 1 or arguments.seed < 0:
        parser.error("all numbers have to be 1 or more, --seed 0 or more")
    measured = {(stages, ranks): measure(arguments, stages, ranks) for stages in STAGES for ranks in RANKS}
    console = Console(width=80)
    for name in ("training", "cost pass"):
        show(console, name, {layout: of[name] for layout, of in measured.items()})
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        rows = [{"stages": stages, "ranks": ranks} | of for (stages, ranks), of in measured.items()]
        arguments.json.write_text(json.dumps({"settings": settings, "layouts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
