"""Resuming a file of scores: what it holds must be what would be written again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.rollouts import (
    Rollout,
    RolloutKey,
    Sample,
    ScoredRollout,
    differences,
    mark,
    read_finished_scored,
    read_rollouts,
    sample_origin,
)
from megatron_ssft.scoring.questions import LocatedQuestion
from megatron_ssft.scoring.verifiers.common import Settings

_START_OF_LINE = b'{"id": '
_GOLD_FIELDS = {"exact": ("answer",), "math": ("answer",), "choice": ("answer", "choices"), "code": ("tests",)}
"""Fields of a question that each verifier reads."""
_ADVICE = "give another --output, or remove the file"


@dataclass(frozen=True)
class Expected:
    """What the scored line of a rollout must say."""

    sample: Sample
    judged: str


class Marks:
    """Computes `judged` of scored lines: a mark of the text, the question's fields and the settings."""

    def __init__(self, questions: dict[str, LocatedQuestion], verifier: str, settings: Settings) -> None:
        self._common = [verifier, settings.answer_after, float(settings.timeout), settings.memory_mb]
        if settings.float_tolerance:
            self._common.append(settings.float_tolerance)
        fields = _GOLD_FIELDS[verifier]
        self._golds = {name: mark([q.row.get(field) for field in fields]) for name, q in questions.items()}

    def of(self, rollout: Rollout) -> str:
        """16 hexadecimal digits; the rollout's question must be known."""
        return mark([rollout.text, self._golds[rollout.id], *self._common])


def expected_scores(
    path: Path, questions: dict[str, LocatedQuestion], data: Path, marks: Marks
) -> dict[RolloutKey, Expected]:
    """Map every rollout's key to what its scored line must say, in the order of the file.

    Raises UserError for a rollout of another question, also under the same id; `data` is where the questions came from.
    """
    expected: dict[RolloutKey, Expected] = {}
    names = Sample.__struct_fields__
    sampling = None
    for rollout in read_rollouts(path):
        if rollout.id not in questions:
            raise UserError(
                f"{path}: id {rollout.id!r} is not in {data}; give the questions the rollouts were made from"
            )
        question = questions[rollout.id]
        if rollout.question is not None and question.mark not in (None, rollout.question):
            raise UserError(
                f"{path}: id {rollout.id!r} was asked another question than {data}:{question.line} holds; give the "
                "questions the rollouts were made from"
            )
        sampling = sampling or rollout.sampling  # equal in the whole file: keep one
        fields = {name: getattr(rollout, name) for name in names}
        expected[rollout.key] = Expected(Sample(**fields | {"sampling": sampling}), marks.of(rollout))
    return expected


def resume(path: Path, *, verifier: str, rollouts: dict[RolloutKey, Expected]) -> set[RolloutKey]:
    """Find the rollouts that a scored file already holds, after cutting off a last line that was never finished.

    `rollouts`: as `expected_scores` returns them. Raises UserError, and leaves the file as it is, where it holds
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
    """Say why a scored line is not what would be written for its rollout now; None if it is."""
    if row.verifier != verifier:
        return f"scored by {row.verifier}, not {verifier}"
    name = f"id {row.id!r}, tag {row.tag}, sample {row.sample}"
    if expected is None:
        return f"{name}: no such rollout"
    # Apart from the origin, whose sampling settings have a seed and a tag of their own.
    details = [{key: getattr(s, key) for key in ("seed", "tag", "finish_reason")} for s in (row, expected.sample)]
    changes = differences(sample_origin(row), sample_origin(expected.sample)) or differences(*details)
    if changes:
        return f"{name}: scored for another rollout, {changes} now"
    if row.judged is None:
        return f"{name}: the line has no 'judged', so what was scored cannot be compared"
    if row.judged != expected.judged:
        return (
            f"{name}: scored with another text, gold answer or tests, --answer-after, --timeout,"
            " --memory-mb or --float-tolerance than now"
        )
    return None
