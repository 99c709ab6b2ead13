"""The questions file as scoring reads it: rows as they stand there, with the gold answers or tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.data.questions import mark_of_row
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.scoring.verifiers.common import Question


@dataclass(frozen=True)
class LocatedQuestion:
    """A question with its place."""

    row: Question
    line: int
    """1-based."""
    mark: str | None = None
    """`question_mark` of the row; None where it has gold answers without a question."""


def read_questions(path: Path) -> dict[str, LocatedQuestion]:
    """Read the rows of a questions file, by id. Raises one UserError for all wrong rows."""
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
                    questions[name] = LocatedQuestion(row, line, mark_of_row(raw, path, line))
                except RowError as error:
                    wrong.add(path, line, error)
    except OSError as error:
        wrong.add_unreadable(path, error)
    wrong.raise_if_any()
    if not questions:
        raise UserError(f"{path}:1: the file is empty; expected one JSON object a line")
    return questions


def _parse_question(raw: bytes) -> Question:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError("not valid JSON; repair or remove the line") from error
    if not isinstance(row, dict):
        raise RowError("expected a JSON object; repair or remove the line")
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id"), (str, int)) or row["id"] == "":
        raise RowError("'id' is missing or no text; give every question its own")
    return row
