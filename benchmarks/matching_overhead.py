"""Time a training step with optimal, random and single matching, in one process, interleaved: the cost of matching.

python benchmarks/matching_overhead.py --model HF_DIR --data gsm8k_teachers.jsonl      # real weights and data
python benchmarks/matching_overhead.py                                             # random weights, made-up data
python benchmarks/matching_overhead.py --shape qwen2.5-1.5b --bf16                 # on a GPU

Every round takes one batch of questions through a whole step (matching, plan, forward, backward, optimizer) in each
mode.
`bound` is 1 + the share of FLOPs that matching adds; peak memory is that of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import numpy as np
from harness import SHAPES, interleaved, made_up_batch, objective_of, peak_memory, ratio, report, start_trainer

import megatron_ssft.parallel.scores as scores_module
from megatron_ssft.config import MatchingConfig
from megatron_ssft.objectives.set_matching import Matched, SetMatching
from megatron_ssft.records import QuestionBatch, StepMetrics
from megatron_ssft.training.trainer import Trainer

MODES = ("optimal", "random", "single")


P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch(Generic[P, R]):
    """Adds up the seconds of a function that it stands in for."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        begin = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin


@dataclasses.dataclass
class Side:
    """A mode of matching and the figures of its steps."""

    matching: SetMatching
    steps: list[tuple[Matched, StepMetrics, float, float]] = dataclasses.field(default_factory=list)
    """(matching, training, seconds of gathering the costs, training FLOPs)"""


def step(trainer: Trainer, side: Side, batch: QuestionBatch) -> None:
    """Train as Trainer.train_step does, on a given batch."""
    gather = scores_module.sum_over_ranks = Stopwatch(scores_module.sum_over_ranks)
    matched = side.matching.match(trainer.context(), batch)
    scores_module.sum_over_ranks = gather.function
    objective = objective_of(trainer)
    planned = objective.plan(trainer.context(), batch, matched.assignments)
    metrics = trainer.engine.train([objective.set_loss(planned, matched.assignments)], lr=1e-6)
    side.steps.append((matched, metrics, gather.seconds, trainer.accountant.training(planned.plan)))


def batches(trainer: Trainer, args: argparse.Namespace) -> list[QuestionBatch]:
    """Make one batch per round, the warm-up included."""
    if args.data is not None:
        return [objective_of(trainer).sets.next_batch() for _ in range(args.rounds + 1)]
    rng = np.random.default_rng(0)
    made = []
    for _ in range(args.rounds + 1):
        lengths = np.clip(rng.lognormal(np.log(args.trace_tokens) - 0.18, 0.6, (args.questions, args.traces)), 8, None)
        lengths = np.minimum(lengths, args.seq_length - args.prompt - 1).astype(int).tolist()
        made.append(made_up_batch(rng, [args.prompt] * args.questions, lengths, 256))
    return made


def run(trainer: Trainer, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure one row per mode."""
    config = objective_of(trainer).config
    sides = {}
    for mode in MODES:
        default = MatchingConfig(matching=mode)  # for single, which scores nothing and takes no --matching-tokens
        matching = default if mode == "single" else dataclasses.replace(config.matching, matching=mode)
        changed = dataclasses.replace(config, matching=matching)
        sides[mode] = Side(SetMatching(changed, trainer.vocabulary.tags))
    made = batches(trainer, args)
    number = dict.fromkeys(MODES, -1)

    def next_step(mode: str) -> None:
        number[mode] += 1
        step(trainer, sides[mode], made[number[mode] % len(made)])

    seconds = interleaved({mode: functools.partial(next_step, mode) for mode in MODES}, args.rounds)
    peaks = {mode: peak_memory(functools.partial(step, trainer, sides[mode], made[-1])) for mode in reversed(MODES)}
    rows = []
    for mode, side in sides.items():
        timed = side.steps[1 : 1 + args.rounds]
        over = {"optimal": "random", "random": "single", "single": "single"}[mode]
        share = sum(m.flops for m, *_ in timed) / sum(flops for *_, flops in timed)
        measured = ratio(seconds[mode], seconds[over])
        around = sum(m.solving_seconds + gathering for m, _, gathering, _ in timed) / sum(seconds[mode])
        rows.append(
            {
                "matching": mode,
                "seconds": statistics.median(seconds[mode]),
                "compared_with": over,
                "ratio": measured,
                "bound": 1 + share,
                "over_bound": (measured - 1) / share if share else None,
                "solving_gathering_broadcasting": around,
                "peak_MiB": peaks[mode] / 2**20,
                "peak_over_single": peaks[mode] / peaks["single"],
                "loss_tokens": sum(m.trained_tokens for _, m, *_ in timed),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: random weights of --shape")
    parser.add_argument("--data", help="JSONL of questions with traces; needs --model for its tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--traces-a-step", type=int, default=16, help="with --data [%(default)s]")
    parser.add_argument("--matching-tokens", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a microbatch [%(default)s]")
    parser.add_argument("--questions", type=int, default=4, help="of made-up data [%(default)s]")
    parser.add_argument("--traces", type=int, default=4, help="of made-up data [%(default)s]")
    parser.add_argument("--prompt", type=int, default=128, help="of made-up data [%(default)s]")
    parser.add_argument("--trace-tokens", type=int, default=256, help="mean of made-up data [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data is not None and args.model is None:
        parser.error("--data needs --model: its tokenizer")
    values = {"load": args.model} if args.model else dict(SHAPES[args.shape])
    values |= {
        "bf16": args.bf16,
        "attention_backend": args.attention_backend,
        "matching_tokens": args.matching_tokens,
        "seq_length": args.seq_length,
        "max_tokens_per_microbatch": args.tokens,
        "global_batch_size": args.traces_a_step,
        "train_iters": 1000,
    }
    if args.data is not None:
        values |= {"max_traces": 6, "trace_filter": "correct=true"}
    trainer = start_trainer(values, args.data)
    name = Path(args.model).name if args.model else args.shape
    report(f"A step of {name}, T_r = {args.matching_tokens}", run(trainer, args), args.json)


if __name__ == "__main__":
    main()
