"""Rollouts to scored rollouts: read, resume, judge, write.

*Read*: the questions (questions.py) and the rollouts. *Resume*: what the output holds already must be what would be
written again (resume.py). *Judge*: a verifier compares each text with its question's gold answer or tests, in
processes of its own (verifiers/), programs in the sandbox (sandbox/). *Write*: line by line, in the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
) -> list[ScoredRollout]:
    """Score what `output` does not hold yet, in the order of `rollouts`; returns all lines of `output`.

    `data` is where `questions` came from, for messages. Raises UserError: for every question without a usable gold
    answer, for rollouts of other questions, for an output that does not fit, and for a disk that refuses; all but the
    last before anything is judged.
    """
    marks = Marks(questions, verifier, settings)
    expected = expected_scores(rollouts, questions, data, marks)
    done = resume(output, verifier=verifier, rollouts=expected)
    with VerifierPool(verifier, settings, workers) as pool:
        _check_golds(pool, questions, data)
        if len(done) < len(expected):
            missing = (rollout for rollout in read_rollouts(rollouts) if rollout.key not in done)
            judged = _judge(pool, missing, questions, verifier, marks)
            with RolloutWriter(output) as writer:
                for scored in progress(judged, len(done), len(expected)):
                    writer.write([scored])
    return read_scored(output)


def _check_golds(pool: VerifierPool, questions: dict[str, LocatedQuestion], data: Path) -> None:
    """Raises one UserError for all questions that the verifier cannot judge by."""
    wrong = WrongRows()
    for question, reason in zip(questions.values(), pool.check(question.row for question in questions.values())):
        if reason is not None:
            wrong.add(data, question.line, reason)
    wrong.raise_if_any()


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
