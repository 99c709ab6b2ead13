"""Rollouts to scored rollouts: reads, resumes, lets the verifiers judge, writes in the order of the input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.formats.rollouts import (
    Rollout,
    RolloutKey,
    RolloutWriter,
    Sample,
    ScoredRollout,
    differences,
    mark,
    read_finished_scored,
    read_rollouts,
    read_scored,
    sample_origin,
    score_rollout,
)
from megatron_ssft.scoring.sandbox import mechanisms, programs
from megatron_ssft.scoring.verifiers.common import Question, Settings
from megatron_ssft.scoring.verifiers.workers import VerifierPool

_START_OF_LINE = b'{"id": '
_GOLD_FIELDS = {"exact": ("answer",), "math": ("answer",), "choice": ("answer", "choices"), "code": ("tests",)}
"""What each verifier reads of a question."""
_ADVICE = "give another --output, or remove the file"

Progress = Callable[[Iterable[ScoredRollout], int, int], Iterator[ScoredRollout]]
"""(scored rollouts as they come, how many were there before, how many there will be) -> the same rollouts."""


@dataclass(frozen=True)
class LocatedQuestion:
    """A question with its place."""

    row: Question
    line: int
    """1-based."""


@dataclass(frozen=True)
class Expected:
    """What the scored line of a rollout must say."""

    sample: Sample
    judged: str


class Marks:
    """`judged` of scored lines: a mark of the text, what the verifier reads of the question, and the settings."""

    def __init__(self, questions: dict[str, LocatedQuestion], verifier: str, settings: Settings) -> None:
        self._common = [verifier, settings.answer_after, float(settings.timeout), settings.memory_mb]
        fields = _GOLD_FIELDS[verifier]
        self._golds = {name: mark([q.row.get(field) for field in fields]) for name, q in questions.items()}

    def of(self, rollout: Rollout) -> str:
        """16 hexadecimal digits; the rollout's question must be known."""
        return mark([rollout.text, self._golds[rollout.id], *self._common])


def read_questions(path: Path) -> dict[str, LocatedQuestion]:
    """The rows of a questions file by id, as they stand there. Raises one UserError for all wrong rows."""
    wrong = WrongRows()
    questions: dict[str, LocatedQuestion] = {}
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    row = _parse_question(raw)
                    name = str(row["id"])
                    if name in questions:
                        raise RowError(f"id {name!r} is already used on line {questions[name].line}")
                    questions[name] = LocatedQuestion(row, line)
                except RowError as error:
                    wrong.add(path, line, error)
    except OSError as error:
        wrong.add_unreadable(path, error)
    wrong.raise_if_any()
    if not questions:
        raise UserError(f"{path}:1: the file is empty; expected one JSON object a line")
    return questions


def _parse_question(raw: bytes) -> dict[str, object]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError("not valid JSON; repair or remove the line") from error
    if not isinstance(row, dict):
        raise RowError("expected a JSON object; repair or remove the line")
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id"), (str, int)) or row["id"] == "":
        raise RowError("'id' is missing or no text; give every question its own")
    return row


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
    keys = _check_rollouts(rollouts, questions, data, marks)
    done = resume(output, verifier=verifier, rollouts=keys)
    with VerifierPool(verifier, settings, workers) as pool:
        _check_golds(pool, questions, data)
        if len(done) < len(keys):
            missing = (rollout for rollout in read_rollouts(rollouts) if rollout.key not in done)
            with RolloutWriter(output) as writer:
                for scored in progress(_scored(pool, missing, questions, verifier, marks), len(done), len(keys)):
                    writer.write([scored])
    return read_scored(output)


def _scored(
    pool: VerifierPool,
    rollouts: Iterable[Rollout],
    questions: dict[str, LocatedQuestion],
    verifier: str,
    marks: Marks,
) -> Iterator[ScoredRollout]:
    """Each rollout with its judgement."""
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


def _check_rollouts(
    path: Path, questions: dict[str, LocatedQuestion], data: Path, marks: Marks
) -> dict[RolloutKey, Expected]:
    """Every rollout's key -> what its scored line must say, in the order of the file. Raises UserError."""
    keys: dict[RolloutKey, Expected] = {}
    names = Sample.__struct_fields__
    sampling = None
    for rollout in read_rollouts(path):
        if rollout.id not in questions:
            raise UserError(
                f"{path}: id {rollout.id!r} is not in {data}; give the questions the rollouts were made from"
            )
        sampling = sampling or rollout.sampling  # equal in the whole file: keep one
        fields = {name: getattr(rollout, name) for name in names}
        keys[rollout.key] = Expected(Sample(**fields | {"sampling": sampling}), marks.of(rollout))
    return keys


def _check_golds(pool: VerifierPool, questions: dict[str, LocatedQuestion], data: Path) -> None:
    """Raises one UserError for all questions that the verifier cannot judge by."""
    wrong = WrongRows()
    for question, reason in zip(questions.values(), pool.check(question.row for question in questions.values())):
        if reason is not None:
            wrong.add(data, question.line, reason)
    wrong.raise_if_any()


def choose_walls(data: Path, unsafe: bool) -> str | None:
    """How programs are to be locked in; None with `unsafe`. Raises UserError where that is impossible."""
    if unsafe:
        return None
    for folder in programs.readable_paths():
        if data.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"{data}: lies in {folder}, where programs under test can read; move the file elsewhere")
    return mechanisms.choose()


def resume(path: Path, *, verifier: str, rollouts: dict[RolloutKey, Expected]) -> set[RolloutKey]:
    """What a scored file already holds, after cutting off a last line that was never finished.

    `rollouts`: as `_check_rollouts` returns them. Raises UserError, and leaves the file as it is, where it holds
    scores of another verifier, of other rollouts, gold answers or settings, or does not say of which.
    """
    try:
        if not path.exists():
            return set()
        rows, whole, torn = read_finished_scored(path)
        for line, row in rows:
            reason = _misfit(row, verifier, rollouts.get(row.key))
            if reason is not None:
                raise UserError(f"{path}:{line}: {reason}; {_ADVICE}")
        if torn:
            if torn[: len(_START_OF_LINE)] != _START_OF_LINE[: len(torn)]:
                raise UserError(f"{path}: does not look like a file of scores; {_ADVICE}")
            os.truncate(path, whole)
    except OSError as error:
        raise UserError(f"{path}: cannot read the scores: {error.strerror}; check the path") from error
    return {row.key for _, row in rows}


def _misfit(row: ScoredRollout, verifier: str, expected: Expected | None) -> str | None:
    """Why a scored line is not what would be written for its rollout now; None if it is."""
    if row.verifier != verifier:
        return f"scored by {row.verifier}, not {verifier}"
    name = f"id {row.id!r}, tag {row.tag}, sample {row.sample}"
    if expected is None:
        return f"{name}: no such rollout"
    # Apart from the origin, whose sampling settings have a seed and a tag of their own.
    own = [{key: getattr(s, key) for key in ("seed", "tag", "finish_reason")} for s in (row, expected.sample)]
    found = differences(sample_origin(row), sample_origin(expected.sample)) or differences(*own)
    if found:
        return f"{name}: scored for another rollout, {found} now"
    if row.judged is None:
        return f"{name}: the line has no 'judged', so what was scored cannot be compared"
    if row.judged != expected.judged:
        return (
            f"{name}: scored with another text, gold answer or tests, --answer-after, --timeout or --memory-mb than now"
        )
    return None
