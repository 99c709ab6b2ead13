"""A row of a public training set with reasoning as a question with traces, and fields that releases share.

A trace of the result is {"text": the reasoning, "answer": the final response, "source", "correct"}, as far as they are
known. What a release leaves empty or unfinished is no error; it is left out and counted by reason.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_ssft.boxed import last_boxes
from megatron_ssft.datasets.golds import gold_of
from megatron_ssft.datasets.tables import Row, question_key
from megatron_ssft.formats.jsonl import RowError, filled_string

EMPTY = "empty"
UNFINISHED = "unfinished reasoning"
NO_RESPONSE = "no response after the reasoning"
SEVERAL = "several blocks of reasoning"

_BEGIN = re.compile(r"\s*(?:<think>|<\|begin_of_thought\|>)")
_END = re.compile(r"</think>|<\|end_of_thought\|>")
_MARKER = re.compile(r"</?think>|<\|(?:begin|end)_of_thought\|>")
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")
_MAX_ANSWER = 100
"""Characters; a longer solution is a derivation and not a final answer."""


@dataclass
class PoolRow:
    """Content of one row of a release: a question, its traces, and what was left out."""

    question: Row
    """`id`, exactly one of prompt, question and messages, and whatever else is known of the question."""
    traces: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of traces that cannot be used."""
    notes: Counter[str] = field(default_factory=Counter)
    """Remark -> how often it applies."""

    @property
    def id(self) -> str:
        """The question's id."""
        return str(self.question["id"])

    def add(self, text: object, what: str, facts: Mapping[str, object], response: object = None) -> None:
        """Add a trace with the `facts` about it, split into reasoning and response where these are not kept apart.

        Raises RowError, which calls the text `what`, for something that is no text.
        """
        if text is None or (isinstance(text, str) and not text.strip()):
            self.left_out[EMPTY] += 1
            return
        text, reason = filled_string(text, what), None
        if response is None:
            text, response, reason = split_reasoning(text)
        elif isinstance(response, str) and not response.strip():
            reason = NO_RESPONSE
        else:
            response = filled_string(response, f"the response to {what}")
            text = _END.sub("", _BEGIN.sub("", text, count=1)) if _MARKER.search(text) else text
        reason = reason or (None if text.strip() else EMPTY)
        if reason:
            self.left_out[reason] += 1
            return
        trace = {"text": text, "answer": response, **facts}
        self.traces.append({name: value for name, value in trace.items() if value is not None})


def split_reasoning(text: str) -> tuple[str, str | None, str | None]:
    """(reasoning, response, why the text cannot be used). Without any marker all is reasoning and the response None."""
    begin, end = _BEGIN.match(text), _END.search(text)
    if end is None:
        return text, None, UNFINISHED if begin else None
    reasoning = text[begin.end() if begin else 0 : end.start()].strip()
    response = _SOLUTION.sub("", text[end.end() :]).strip()
    if _MARKER.search(reasoning) or _MARKER.search(response):
        return reasoning, response, SEVERAL
    return reasoning, response or None, None if response else NO_RESPONSE


@dataclass(frozen=True)
class FormatOptions:
    """Options of the readers of releases."""

    source: str | None = None
    """Name of the teacher of all traces whose row does not name one."""
    keep_system: bool = False
    """Keep the system prompt of a conversation; OpenThoughts' asks for markers that are taken out here."""


def final_answer(solution: str) -> str | None:
    r"""Final answer of a solution: its last \boxed{}, or all of it if it is one short line.

    Boxes that belong together, as in `\boxed{1} and \boxed{2}`, are joined by commas.
    """
    _, boxes = last_boxes(solution)
    if boxes:
        return ", ".join(box.strip() for box in boxes if box.strip()) or None
    text = solution.strip()
    return text if len(text) <= _MAX_ANSWER and "\n" not in text else None


def question_row(row: Row, name: str, release: str, extra: dict[str, str]) -> PoolRow:
    """The question in the field `name` under an id made from its words, and the fields of `extra` under new names."""
    question: Row = {"question": filled_string(row.get(name), repr(name))}
    texts = {new: optional_text(row, old) for old, new in extra.items()}
    present = {name: text for name, text in texts.items() if text is not None}
    return PoolRow({"id": f"{release}-{question_key(question)[:16]}", **question, **present})


def add_gold(question: PoolRow, row: Row, name: str) -> None:
    """The gold answer in the field `name`, which may be a number; none where it is missing or blank.

    Raises RowError for NaN and for anything that is no answer.
    """
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return
    question.question["answer"] = gold_of(value, repr(name), question.notes)


def add_number(question: PoolRow, row: Row, name: str) -> None:
    """The number in the field `name`, where it holds one."""
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        question.question[name] = value


def optional_text(row: Row, name: str) -> str | None:
    """The text in a field; None where it is missing, blank or no text."""
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else None


def as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def aligned(row: Row, name: str, length: int, flags: bool = False) -> list[object]:
    """The list in the field `name`, one item a trace; nulls where the field is missing. Raises RowError."""
    values = row.get(name)
    if values is None:
        return [None] * length
    if flags and not (isinstance(values, list) and all(v is None or isinstance(v, bool) for v in values)):
        raise RowError(f"'{name}' must be a list of true and false, one per trace")
    values = as_list(values)
    if len(values) != length:
        raise RowError(f"'{name}' has {len(values)} items for {length} traces")
    return values
