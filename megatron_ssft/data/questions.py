"""Questions to generate answers for: the rows that training reads, whose traces may be left out."""

from __future__ import annotations

import codecs
import dataclasses
import json
from pathlib import Path

from megatron_ssft.data.examples import parse_row
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows, parse_json
from megatron_ssft.formats.rollouts import mark
from megatron_ssft.records import SetExample

_FIELDS = ("id", "prompt", "question", "messages", "system", "tools", "chat_template_kwargs", "system_prompt")


def read_questions(path: Path, limit: int | None = None) -> list[SetExample]:
    """The first `limit` questions of a file (None: all) with id and prompt, without traces and answers.

    What else a row holds is for the verifiers and not looked at. Raises one UserError for all wrong rows of the file.
    """
    wrong = WrongRows()
    examples: dict[str, SetExample] = {}
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
                if not raw.strip():
                    continue
                try:
                    example = _parse_question(raw, path, line)
                    if example.id in examples:
                        raise RowError(f"id {example.id!r} is already used on line {examples[example.id].line}")
                    examples[example.id] = example
                except RowError as error:
                    wrong.add(path, line, error)
    except OSError as error:
        wrong.add_unreadable(path, error)
    wrong.raise_if_any()
    if not examples:
        raise UserError(f"{path}:1: the file is empty; expected one JSON object a line")
    return list(examples.values())[:limit]


def question_mark(example: SetExample) -> str:
    """`mark` of what a row asks: prompt or chat turns, and tools. It does not depend on tokenizer or chat template."""
    return mark([example.prompt, example.messages, example.tools])


def mark_of_row(raw: bytes, path: Path, line: int) -> str | None:
    """`question_mark` of a line of a questions file; None where it does not hold a question."""
    try:
        return question_mark(_parse_question(raw.removeprefix(codecs.BOM_UTF8), path, line))
    except RowError:
        return None


def _parse_question(raw: bytes, path: Path, line: int) -> SetExample:
    """One line of the file. Raises RowError."""
    row = parse_json(raw)
    if isinstance(row, dict):
        # Rows for training have at least one trace; this one is taken out again.
        row = {name: row[name] for name in _FIELDS if name in row} | {"traces": [{"text": "none"}]}
    return dataclasses.replace(parse_row(json.dumps(row).encode("ascii"), str(path), line), traces=())
