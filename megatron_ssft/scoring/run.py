"""Rollouts to scored rollouts: read, resume, judge, write.

*Read*: the questions (questions.py) and the rollouts. *Resume*: what the output holds already must be what would be
written again (resume.py). *Judge*: a verifier compares each text with its question's gold answer or tests, in
processes of its own (verifiers/), programs in the sandbox (sandbox/). *Write*: line by line, in the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import WrongRows
from megatron_ssft.formats.rollout_writer import RolloutWriter
from megatron_ssft.formats.rollouts import (
    Rollout,
    ScoredRollout,
    read_rollouts,
    read_scored,
    score_rollout,
)
from megatron_ssft.scoring.questions import LocatedQuestion
from megatron_ssft.scoring.resume import Marks, expected_scores, resume
from megatron_ssft.scoring.sandbox import mechanisms, programs
from megatron_ssft.scoring.sandbox.inside.specification import Mechanism
from megatron_ssft.scoring.verifiers.common import Question, Settings
from megatron_ssft.scoring.verifiers.workers import VerifierPool

Progress = Callable[[Iterable[ScoredRollout], int, int], Iterator[ScoredRollout]]
"""(scored rollouts as they come, how many were there before, how many there will be) -> the same rollouts."""


@dataclass(frozen=True)
class Skipped:
    """What is left out for want of usable gold answers."""

    questions: int
    rollouts: int
    reasons: WrongRows


def score_file(
    rollouts: Path,
    questions: dict[str, LocatedQuestion],
    data: Path,
    output: Path,
    *,
    verifier: str,
    settings: Settings,
    workers: int,
    progress: Progress,
    skip_bad_golds: bool = False,
    skipped: Callable[[Skipped], None] = lambda skipped: None,
) -> list[ScoredRollout]:
    """Score what `output` does not hold yet, in the order of `rollouts`; returns all lines of `output`.

    `data` is where `questions` came from, for messages. Raises UserError: for every question without a usable gold
    answer, for rollouts of other questions, for an output that does not fit, and for a disk that refuses; all but the
    last before anything is judged. With `skip_bad_golds` the rollouts of questions without a usable gold answer are
    left out, `skipped` is told of them, and only where nothing is left it is an error.
    """
    marks = Marks(questions, verifier, settings)
    expected = expected_scores(rollouts, questions, data, marks)
    done = resume(output, verifier=verifier, rollouts=expected)
    with VerifierPool(verifier, settings, workers) as pool:
        bad = _bad_golds(pool, questions)
        left = {key for key in expected if key[0] not in bad}
        wrong = _wrong_rows(bad, questions, data)
        if not (skip_bad_golds and left):
            wrong.raise_if_any()
        if bad:
            skipped(Skipped(len(bad), len(expected) - len(left), wrong))
        if len(done) < len(left):
            keys = left - done
            missing = (rollout for rollout in read_rollouts(rollouts) if rollout.key in keys)
            judged = _judge(pool, missing, questions, verifier, marks)
            with RolloutWriter(output) as writer:
                for scored in progress(judged, len(done), len(left)):
                    writer.write([scored])
    return read_scored(output)


def _bad_golds(pool: VerifierPool, questions: dict[str, LocatedQuestion]) -> dict[str, str]:
    """Question's id -> why the verifier cannot judge by it."""
    reasons = pool.check(question.row for question in questions.values())
    return {name: reason for name, reason in zip(questions, reasons) if reason is not None}


def _wrong_rows(bad: dict[str, str], questions: dict[str, LocatedQuestion], data: Path) -> WrongRows:
    wrong = WrongRows()
    for name, reason in bad.items():
        wrong.add(data, questions[name].line, reason)
    return wrong


def _judge(
    pool: VerifierPool,
    rollouts: Iterable[Rollout],
    questions: dict[str, LocatedQuestion],
    verifier: str,
    marks: Marks,
) -> Iterator[ScoredRollout]:
    """Yield each rollout with its judgement."""
    waiting: list[Rollout] = []

    def rows() -> Iterator[tuple[str, Question]]:
        for rollout in rollouts:
            waiting.append(rollout)
            yield rollout.text, questions[rollout.id].row

    for judgement in pool.judge(rows()):
        rollout = waiting.pop(0)
        yield score_rollout(
            rollout,
            correct=judgement.correct,
            answer=judgement.answer,
            verdict=judgement.verdict,
            verifier=verifier,
            judged=marks.of(rollout),
        )


def choose_mechanism(data: Path, unsafe: bool) -> Mechanism | None:
    """Choose the mechanism of the sandbox; None with `unsafe`.

    Raises UserError where no mechanism holds, and where programs under test could read `data`.
    """
    if unsafe:
        return None
    for folder in programs.readable_paths():
        if data.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"{data}: lies in {folder}, where programs under test can read; move the file elsewhere")
    return mechanisms.choose()
