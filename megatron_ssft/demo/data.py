"""A synthetic set of questions with traces from six teachers, small enough to train on in a minute on a CPU.

A question is an operation and four digits 0..7, `sum 3571`, to be folded from the left; the operations are associative,
so every teacher's way reaches the same value. Each teacher has a way of writing and operations it is good at:

    teacher     weight  good at   trace for `sum 3571`
    left_fold   3       sum max   3>7>7>7#7
    right_fold  3       sum or    1<7<7<7#7
    pairs       2       sum or    (35)7(71)7#7
    verbose     2       sum max   3.5=7;7.7=7;7.1=7#7
    guess       1       max       ?#7
    code        1       or min    x=3;x=7;x=7;x=7#7

What stands before `#` is always worked out correctly; whether a trace is right is decided at `#` alone, with
probability .95 where the teacher is good and .05 elsewhere. A wrong answer is (gold + 1 + teacher) mod 8, teacher
counted from 0: never the gold answer, and no two teachers are wrong in the same way, so a vote is never won by a
shared mistake. By construction this set tests the mechanism (do tags come to stand for ways of reasoning?); it is
no evidence for results on any benchmark.
"""

from __future__ import annotations

import itertools
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.jsonl import write_objects

Operation = Callable[[int, int], int]
Digits = tuple[int, int, int, int]

OPERATIONS: dict[str, Operation] = {
    "sum": lambda x, y: min(7, x + y),
    "or": operator.or_,
    "max": max,
    "min": min,
}
"""Name in the question -> operation on 0..7; all are associative."""

ACCURACY_GOOD = 0.95
ACCURACY_BAD = 0.05


def _left_fold(op: Operation, digits: Digits) -> str:
    return ">".join(map(str, itertools.accumulate(digits, op)))


def _right_fold(op: Operation, digits: Digits) -> str:
    return "<".join(map(str, itertools.accumulate(reversed(digits), lambda acc, x: op(x, acc))))


def _pairs(op: Operation, digits: Digits) -> str:
    a, b, c, d = digits
    return f"({a}{b}){op(a, b)}({c}{d}){op(c, d)}"


def _verbose(op: Operation, digits: Digits) -> str:
    before = itertools.accumulate(digits, op)
    return ";".join(f"{acc}.{x}={op(acc, x)}" for acc, x in zip(before, digits[1:]))


def _guess(op: Operation, digits: Digits) -> str:
    return "?"


def _code(op: Operation, digits: Digits) -> str:
    return ";".join(f"x={acc}" for acc in itertools.accumulate(digits, op))


@dataclass(frozen=True)
class Teacher:
    """One way of writing, with the operations it is good at."""

    name: str
    weight: int
    """Relative chance of being drawn next for a question, without replacement."""
    good_at: tuple[str, ...]
    write: Callable[[Operation, Digits], str]
    """Operation and digits -> the trace up to, without, `#answer`."""


TEACHERS: tuple[Teacher, ...] = (
    Teacher("left_fold", 3, ("sum", "max"), _left_fold),
    Teacher("right_fold", 3, ("sum", "or"), _right_fold),
    Teacher("pairs", 2, ("sum", "or"), _pairs),
    Teacher("verbose", 2, ("sum", "max"), _verbose),
    Teacher("guess", 1, ("max",), _guess),
    Teacher("code", 1, ("or", "min"), _code),
)


def make_demo_sets(
    train: int = 2048, held_out: int = 256, traces: int = 4, seed: int = 1234
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and held-out rows {"id", "question", "answer", "operation", "traces": [{"text", "source", "correct"}]}.

    The two lists share no question, each holds every operation equally often, in random order. Each question gets
    `traces` different teachers, in random order. The same arguments give the same rows. Raises UserError for counts
    that cannot be met.
    """
    available = len(OPERATIONS) * 8**4
    for flag, count in (("train", train), ("held-out", held_out)):
        if count <= 0 or count % len(OPERATIONS):
            raise UserError(
                f"--{flag} {count}: must be a positive multiple of {len(OPERATIONS)}, one part per operation"
            )
    if train + held_out > available:
        raise UserError(f"--train {train} and --held-out {held_out}: only {available} different questions exist")
    if not 1 <= traces <= len(TEACHERS):
        raise UserError(f"--traces {traces}: must lie between 1 and {len(TEACHERS)}, the number of teachers")

    rng = random.Random(seed)
    train_rows, held_out_rows = [], []
    per_train, per_held_out = train // len(OPERATIONS), held_out // len(OPERATIONS)
    for name in OPERATIONS:
        every_digits: list[Digits] = [(a, b, c, d) for a, b, c, d in itertools.product(range(8), repeat=4)]
        drawn = rng.sample(every_digits, per_train + per_held_out)
        rows = [_question_row(name, digits, traces, rng) for digits in drawn]
        train_rows += rows[:per_train]
        held_out_rows += rows[per_train:]
    rng.shuffle(train_rows)
    rng.shuffle(held_out_rows)
    return train_rows, held_out_rows


def _question_row(name: str, digits: Digits, traces: int, rng: random.Random) -> dict[str, object]:
    op = OPERATIONS[name]
    gold = reduce(op, digits)
    text = "".join(map(str, digits))
    # Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted draw without replacement.
    keyed = sorted(range(len(TEACHERS)), key=lambda t: -(rng.random() ** (1 / TEACHERS[t].weight)))
    chosen = keyed[:traces]
    rng.shuffle(chosen)  # the draw comes out heavy teachers first: the order must not tell
    return {
        "id": f"{name}-{text}",
        "question": f"{name} {text}",
        "answer": str(gold),
        "operation": name,
        "traces": [_trace_row(t, name, digits, gold, rng) for t in chosen],
    }


def _trace_row(index: int, name: str, digits: Digits, gold: int, rng: random.Random) -> dict[str, object]:
    teacher = TEACHERS[index]
    correct = rng.random() < (ACCURACY_GOOD if name in teacher.good_at else ACCURACY_BAD)
    answer = gold if correct else (gold + 1 + index) % 8
    return {"text": f"{teacher.write(OPERATIONS[name], digits)}#{answer}", "source": teacher.name, "correct": correct}


def write_demo_data(
    folder: Path, train: int = 2048, held_out: int = 256, traces: int = 4, seed: int = 1234
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` into `folder` and return their paths. Raises UserError."""
    train_rows, held_out_rows = make_demo_sets(train, held_out, traces, seed)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    try:
        for path, rows in zip(paths, (train_rows, held_out_rows)):
            write_objects(path, rows)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot write the data: {reason_of(error)}") from error
    return paths


_STYLES = {
    "left_fold": r"[0-7](>[0-7]){3}",
    "right_fold": r"[0-7](<[0-7]){3}",
    "pairs": r"\([0-7]{2}\)[0-7]\([0-7]{2}\)[0-7]",
    "verbose": r"[0-7]\.[0-7]=[0-7](;[0-7]\.[0-7]=[0-7]){2}",
    "guess": r"\?",
    "code": r"x=[0-7](;x=[0-7]){3}",
}
"""Form of what each teacher writes before `#`, right or wrong."""


def writing_style(text: str) -> str | None:
    """The teacher in whose style `text` is written, by its form alone; None for what no teacher would write."""
    return next((name for name, form in _STYLES.items() if re.fullmatch(form + "#[0-7]", text)), None)
