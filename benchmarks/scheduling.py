"""PADs, makespan and planning time of five schedulers over random workloads, nothing executed.

python benchmarks/scheduling.py
python benchmarks/scheduling.py --repeats 50 --json scheduling.json
python benchmarks/scheduling.py --search 1000    # instead: what the exact search for a packing without PADs buys

The work of a step is counted in FLOPs of a 32B-parameter shape. What the columns (and the keys of the JSON) say, each
the mean over the repetitions:

pad_share            PADs over all sequences run. least_pad_share: the same for the least number of PADs that equal
                     microbatch counts (where the scheduler needs them) allow for these traces.
pad_over_bound       sequences run, PADs included, over what is run with the least number of PADs: 1 is the least, and
                     defined where that number is 0.
makespan_over_bound  work of the busiest rank over max(work of all traces / ranks, work of the heaviest trace), without
                     PADs; in streams the prompt of a question counts once.
time_per_trace       makespan over the number of traces trained, relative to the token budget's.
planning_ms          processor time of planning.

The schedulers:

token_budget    streams of at most --max-tokens tokens in which a question's traces share its prompt; ranks may have
                different numbers of them.
equal_streams   the same with equal numbers, a multiple of --group-size.
padded          microbatches of --micro-batch-size sequences, the same number on every rank, traces placed by work.
per_question    question k goes to rank k mod R with all its traces; PADs give the ranks equal counts.
per_rank_queue  question k waits in the queue of rank k mod R; each rank takes questions from its own until it has its
                share of the step's traces; PADs give the ranks equal counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_ssft.config import ModelConfig
from megatron_ssft.records import (
    PAD,
    Assignment,
    ForkingTokens,
    MicrobatchPlan,
    QuestionBatch,
    QuestionVisit,
    SequenceSpec,
    TokenizedSet,
)
from megatron_ssft.scheduling import RowLimits, StreamLimits, WorkModel, plan_train_rows, plan_train_streams
from megatron_ssft.scheduling.sequences import train_sequences
from megatron_ssft.scheduling.work import padded_size

SHAPE = ModelConfig(
    num_layers=64, hidden_size=5120, num_attention_heads=40, num_query_groups=8, kv_channels=128, ffn_hidden_size=27648
)
VOCABULARY = 152064
TAGS = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 7)), tuple((VOCABULARY + i,) for i in range(6)), "special")
Planned = TypeVar("Planned")
SHORTEST, LONGEST = 64, 32000
"""Traces are cut to this range of tokens."""


@dataclass(frozen=True)
class Workload:
    """What a step consists of."""

    name: str
    questions: int
    traces: tuple[int, int]
    """Of a question: uniform between these two."""
    ranks: int


WORKLOADS = (
    Workload("8 questions x 4 traces, 8 ranks", 8, (4, 4), 8),
    Workload("32 questions x 4 traces, 8 ranks", 32, (4, 4), 8),
    Workload("16 questions x 1-6 traces, 8 ranks", 16, (1, 6), 8),
    Workload("1024 questions x 4 traces, 64 ranks", 1024, (4, 4), 64),
)


@dataclass(frozen=True)
class Outcome:
    """What one scheduler made of one step."""

    traces: int
    pads: int
    least_pads: int
    makespan: float
    makespan_bound: float
    planning_ms: float


class Draw:
    """A random step: questions in the order of the data, more than it needs, and the settings."""

    def __init__(self, workload: Workload, arguments: argparse.Namespace, seed: Sequence[int]) -> None:
        rng = np.random.default_rng(seed)
        self.workload, self.arguments = workload, arguments
        self.work = WorkModel.for_model(SHAPE, VOCABULARY)
        mu = math.log(arguments.mean_tokens) - arguments.sigma**2 / 2
        low, high = workload.traces
        # A rank's queue holds what it needs even if all its questions have the fewest traces.
        supply = workload.questions * -(-(low + high) // (2 * low)) + workload.ranks
        self.questions = []
        for k in range(supply):
            lengths = np.clip(rng.lognormal(mu, arguments.sigma, rng.integers(low, high + 1)), SHORTEST, LONGEST)
            completions = tuple(np.zeros(int(length), dtype=np.int32) for length in lengths)
            prompt = np.zeros(arguments.prompt_tokens, dtype=np.int32)
            self.questions.append(TokenizedSet(f"q{k}", "", k + 1, prompt, completions, (None,) * len(completions)))

    def batch(self, which: Sequence[int]) -> tuple[QuestionBatch, list[Assignment]]:
        """These questions as a step, a tag of its own for each trace of a question."""
        sets = tuple(self.questions[k] for k in which)
        assignments = [Assignment(tuple(range(s.num_traces))) for s in sets]
        return QuestionBatch(tuple(QuestionVisit(k, 0) for k in which), sets), assignments


def token_budget(draw: Draw) -> Outcome:
    """Ours: streams of tokens."""
    return _streams(draw, equal_counts=False)


def equal_streams(draw: Draw) -> Outcome:
    """Ours: streams of tokens, the same number on every rank."""
    return _streams(draw, equal_counts=True)


def _streams(draw: Draw, equal_counts: bool) -> Outcome:
    batch, assignments = draw.batch(range(draw.workload.questions))
    arguments = draw.arguments
    limits = StreamLimits(draw.workload.ranks, arguments.max_tokens, arguments.group_size, equal_counts=equal_counts)
    planned, planning_ms = _timed(lambda: plan_train_streams(batch, assignments, TAGS, limits, draw.work))
    pads, least = planned.pad_sequences, planned.pad_lower_bound
    return Outcome(batch.num_traces, pads, least, planned.makespan, planned.makespan_lower_bound, planning_ms)


def padded(draw: Draw) -> Outcome:
    """Ours: microbatches with a row a trace."""
    batch, assignments = draw.batch(range(draw.workload.questions))
    arguments = draw.arguments
    limits = RowLimits(draw.workload.ranks, arguments.micro_batch_size, group_size=arguments.group_size)
    planned, planning_ms = _timed(lambda: plan_train_rows(batch, assignments, TAGS, limits, draw.work))
    ranks = [[list(mb.sequences) for mb in rank] for rank in planned.ranks]
    return _padded_outcome(draw, ranks, planning_ms)


def per_question(draw: Draw) -> Outcome:
    """Baseline: the questions of the step are dealt out to the ranks, one after the other."""
    ranks = draw.workload.ranks
    dealt = [list(range(rank, draw.workload.questions, ranks)) for rank in range(ranks)]
    return _padded_outcome(draw, *_timed(lambda: _fixed_to_ranks(draw, dealt)))


def per_rank_queue(draw: Draw) -> Outcome:
    """Baseline: each rank has its own part of the data and takes whole questions until it has its share."""
    workload = draw.workload
    share = workload.questions * sum(workload.traces) / 2 / workload.ranks
    taken = []
    for rank in range(workload.ranks):
        own: list[int] = []
        traces = 0
        for k in range(rank, len(draw.questions), workload.ranks):
            if traces >= share:
                break
            own.append(k)
            traces += draw.questions[k].num_traces
        taken.append(own)
    return _padded_outcome(draw, *_timed(lambda: _fixed_to_ranks(draw, taken)))


SCHEDULERS: tuple[Callable[[Draw], Outcome], ...] = (
    token_budget,
    equal_streams,
    padded,
    per_question,
    per_rank_queue,
)


def _timed(plan: Callable[[], Planned]) -> tuple[Planned, float]:
    """(what it returns, milliseconds of processor time)"""
    start = time.process_time()
    planned = plan()
    return planned, (time.process_time() - start) * 1000


def _fixed_to_ranks(draw: Draw, questions: list[list[int]]) -> list[list[list[SequenceSpec]]]:
    """Microbatches of each rank from the traces of its questions, filled up with PADs to equal counts.

    A rank sorts its traces by length before it cuts them into microbatches, to pad little.
    """
    size, group = draw.arguments.micro_batch_size, draw.arguments.group_size
    sequences = [train_sequences(*draw.batch(which), TAGS) for which in questions]
    count = -(-max(map(len, sequences)) // (size * group)) * group
    for rows in sequences:
        rows += [PAD] * (count * size - len(rows))
    return [[rows[k : k + size] for k in range(0, count * size, size)] for rows in sequences]


def _padded_outcome(draw: Draw, ranks: list[list[list[SequenceSpec]]], planning_ms: float) -> Outcome:
    sequences = [s for rank in ranks for microbatch in rank for s in microbatch]
    each = [draw.work.of(padded_size([s])) for s in sequences if not s.is_pad]
    step = len(ranks) * draw.arguments.micro_batch_size * draw.arguments.group_size
    return Outcome(
        traces=len(each),
        pads=len(sequences) - len(each),
        least_pads=-len(each) % step,
        makespan=max(math.fsum(draw.work.of(padded_size(microbatch)) for microbatch in rank) for rank in ranks),
        makespan_bound=max(math.fsum(each) / len(ranks), max(each)),
        planning_ms=planning_ms,
    )


def measure(workload: Workload, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of each scheduler; all plan the same steps, in turn."""
    outcomes: dict[str, list[Outcome]] = {scheduler.__name__: [] for scheduler in SCHEDULERS}
    for repeat in range(arguments.repeats):
        draw = Draw(workload, arguments, (arguments.seed, workload.questions, workload.ranks, repeat))
        for scheduler in SCHEDULERS:
            outcomes[scheduler.__name__].append(scheduler(draw))
    ours = _mean(o.makespan / o.traces for o in outcomes["token_budget"])
    return {
        name: {
            "traces": _mean(o.traces for o in results),
            "pads": _mean(o.pads for o in results),
            "pad_share": _mean(o.pads / (o.traces + o.pads) for o in results),
            "least_pad_share": _mean(o.least_pads / (o.traces + o.least_pads) for o in results),
            "pad_over_bound": _mean((o.traces + o.pads) / (o.traces + o.least_pads) for o in results),
            "makespan_over_bound": _mean(o.makespan / o.makespan_bound for o in results),
            "makespan_over_bound_worst": max(o.makespan / o.makespan_bound for o in results),
            "time_per_trace": _mean(o.makespan / o.traces for o in results) / ours,
            "planning_ms": _mean(o.planning_ms for o in results),
        }
        for name, results in outcomes.items()
    }


SEARCH_WORKLOADS = {
    "1-32 x 1-6 traces": ((1, 32), (1, 6), 7500.0),
    "1-6 x 1-4, long": ((1, 6), (1, 4), 15000.0),
}
"""Name -> questions and traces per question (uniform between the two), mean tokens of a trace."""


def measure_search(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What the search changes: the same steps with equal counts, planned with it and without (effort 0)."""
    results = {}
    for number, (name, (questions, traces, mean_tokens)) in enumerate(SEARCH_WORKLOADS.items()):
        settings = argparse.Namespace(**(vars(arguments) | {"mean_tokens": mean_tokens}))
        figures = dict.fromkeys(("fewer_pads", "certified", "uncertain"), 0)
        times: dict[str, list[float]] = {"without": [], "with": []}
        for repeat in range(arguments.search):
            rng = np.random.default_rng((arguments.seed, number, repeat))
            workload = Workload(name, int(rng.integers(questions[0], questions[1] + 1)), traces, 0)
            draw = Draw(workload, settings, (arguments.seed, number, repeat, 1))
            batch, assignments = draw.batch(range(workload.questions))
            ranks, group_size = int(rng.choice([2, 4, 8])), int(rng.choice([1, 2]))
            plans: dict[str, MicrobatchPlan] = {}
            for side in times:
                limits = StreamLimits(ranks, arguments.max_tokens, group_size, equal_counts=True)
                if side == "without":
                    limits = dataclasses.replace(limits, search_effort=0)
                plans[side], planning_ms = _timed(
                    functools.partial(plan_train_streams, batch, assignments, TAGS, limits, draw.work)
                )
                times[side].append(planning_ms)
            before, after = plans["without"], plans["with"]
            figures["fewer_pads"] += after.pad_sequences < before.pad_sequences
            figures["certified"] += before.pad_lower_bound < after.pad_lower_bound == after.pad_sequences
            figures["uncertain"] += after.pad_lower_bound < after.pad_sequences
        added = [after - before for before, after in zip(times["without"], times["with"])]
        results[name] = figures | {"mean_ms": _mean(times["with"]), "most_added_ms": max(added)}
    return results


def show_search(console: Console, workloads: int, results: dict[str, dict[str, float]]) -> None:
    """Print what the search changes, a row per kind of workload."""
    table = Table(title=f"what the exact search changes in {workloads:,} steps each", width=80)
    table.add_column("questions x traces", no_wrap=True)
    for name in ("fewer PADs", "least proved", "open", "planning ms", "most added ms"):
        table.add_column(name, justify="right")
    for name, figures in results.items():
        counts = (f"{figures[key]:.0f}" for key in ("fewer_pads", "certified", "uncertain"))
        table.add_row(name, *counts, f"{figures['mean_ms']:.1f}", f"{figures['most_added_ms']:.1f}")
    console.print(table)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def show(console: Console, workload: Workload, figures: dict[str, dict[str, float]]) -> None:
    """Print one workload's table."""
    table = Table(title=workload.name, width=80)
    table.add_column("scheduler", no_wrap=True)
    for name in ("PAD share", "least", "run / least", "makespan / bound", "time a trace", "planning ms"):
        table.add_column(name, justify="right")
    for name, of in figures.items():
        table.add_row(
            name,
            f"{of['pad_share']:.1%}",
            f"{of['least_pad_share']:.1%}",
            f"{of['pad_over_bound']:.3f}",
            f"{of['makespan_over_bound']:.3f}",
            f"{of['time_per_trace']:.2f}",
            f"{of['planning_ms']:.1f}",
        )
    console.print(table)


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number above 0")
        return value

    return parse


def _arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--repeats", type=_positive(int), default=20, help="random steps a workload [20]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-tokens", type=_positive(float), default=7500.0, help="of a trace, lognormal [7500]")
    parser.add_argument("--sigma", type=_positive(float), default=0.6, help="of the logarithm [0.6]")
    parser.add_argument("--prompt-tokens", type=_positive(int), default=200)
    parser.add_argument("--max-tokens", type=_positive(int), default=32768, help="in a stream [32768]")
    parser.add_argument("--micro-batch-size", type=_positive(int), default=1)
    parser.add_argument("--group-size", type=_positive(int), default=1, help="counts are a multiple of it [1]")
    parser.add_argument("--search", type=_positive(int), metavar="STEPS", help="measure the exact search instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error("argument --seed: has to be 0 or more")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        parser.error(f"argument --json: {arguments.json} cannot be written; name a file in a folder that exists")
    return arguments


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = _arguments(parser)
    console = Console(width=80)
    measured: dict[str, object] = {}
    if arguments.search is not None:
        search = measure_search(arguments)
        show_search(console, arguments.search, search)
        measured = {"search": search}
    else:
        results = []
        for workload in WORKLOADS:
            figures = measure(workload, arguments)
            show(console, workload, figures)
            results.append({"workload": workload.name, "ranks": workload.ranks, "schedulers": figures})
        measured = {"workloads": results}
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        try:
            arguments.json.write_text(json.dumps({"settings": settings} | measured, indent=1) + "\n")
        except OSError as error:
            parser.error(f"argument --json: {arguments.json}: {error.strerror}")


if __name__ == "__main__":
    main()
