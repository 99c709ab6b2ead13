"""Questions to generate answers for: the rows that training reads, whose traces may be left out."""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.data import jsonl
from megatron_ssft.data.jsonl import RowError, WrongRows
from megatron_ssft.errors import UserError
from megatron_ssft.records import SetExample


def read_questions(path: Path, limit: int | None = None) -> list[SetExample]:
    """The first `limit` questions of a file (None: all) with id and prompt, without traces and answers.

    What else a row holds is for the verifiers and not looked at. Raises one UserError for all wrong rows of the file.
    """
    wrong, examples, first_use = WrongRows(), [], {}
    try:
        for line, raw in jsonl._numbered_rows(path):
            try:
                example = _parse_row(raw, str(path), line)
                if example.id in first_use:
                    raise RowError(f"id {example.id!r} is already used on line {first_use[example.id]}")
            except RowError as error:
                wrong.add(path, line, error)
            else:
                first_use[example.id] = line
                examples.append(example)
    except OSError as error:
        wrong.add_unreadable(path, error)
    wrong.raise_if_any()
    if not examples:
        raise UserError(f"{path}:1: the file is empty; expected one JSON object a line")
    return examples[:limit]


def _parse_row(raw: bytes, file: str, line: int) -> SetExample:
    """One line of the file. Raises RowError with the first thing that is wrong with it."""
    row = jsonl._parse_json(raw)
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {jsonl._kind(row)}")
    name = jsonl._parse_id(row)
    given = [field for field in jsonl._PROMPT_FIELDS if row.get(field) is not None]
    if len(given) != 1:
        found = " and ".join(map(repr, given)) if given else "none of them"
        raise RowError(f"give exactly one of 'prompt', 'question' and 'messages'; found {found}")
    prompt, messages = None, None
    if given == ["messages"]:
        messages = jsonl._parse_messages(row["messages"])
    elif given == ["question"]:
        messages = ({"role": "user", "content": jsonl._filled_string(row["question"], "'question'")},)
    else:
        prompt = jsonl._filled_string(row["prompt"], "'prompt'")
    return SetExample(id=name, file=file, line=line, traces=(), prompt=prompt, messages=messages)
