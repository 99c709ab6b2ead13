"""Rows of public training sets with reasoning to questions with traces, all in one form.

A trace of the result is {"text": the reasoning, "answer": the final response, "source", "correct"}, as far as they are
known. What a release leaves empty or unfinished is no error; it is left out and counted by reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_ssft.boxed import last_boxes
from megatron_ssft.datasets.tables import Row, check_row, question_key
from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of

EMPTY = "empty"
UNFINISHED = "unfinished reasoning"
NO_RESPONSE = "no response after the reasoning"
SEVERAL = "several blocks of reasoning"

_BEGIN = re.compile(r"\s*(?:<think>|<\|begin_of_thought\|>)")
_END = re.compile(r"</think>|<\|end_of_thought\|>")
_MARKER = re.compile(r"</?think>|<\|(?:begin|end)_of_thought\|>")
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")
_TRAJECTORY = "_thinking_trajectory"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
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


def _project(row: Row, options: FormatOptions) -> PoolRow:
    """The project's own rows; fields that training does not know stay."""
    check_row(row)
    result = PoolRow({k: v for k, v in row.items() if k != "traces" and v is not None} | {"id": str(row["id"])})
    traces = row["traces"]
    assert isinstance(traces, list), "the row was checked"
    for number, trace in enumerate(traces, start=1):
        facts = {"source": options.source} | {k: v for k, v in trace.items() if v is not None}
        text, response = facts.pop("text"), facts.pop("answer", None)
        result.add(text, f"'text' of trace {number}", facts, response)
    return result


def _s1k(row: Row, options: FormatOptions) -> PoolRow:
    """s1K-1.1 and pools of its form: <source>_thinking_trajectory, <source>_attempt and <source>_grade.

    Trajectory, attempt and grade may be lists, for several traces of one source.
    """
    result = _question(row, "question", "s1k", {"cot_type": "subject", "source_type": "origin"})
    if solution := _text_in(row, "solution"):
        result.question["solution"] = solution
        answer = final_answer(solution)
        result.question.update({} if answer is None else {"answer": answer})
    for name in row:
        if not name.endswith(_TRAJECTORY):
            continue
        source = name.removesuffix(_TRAJECTORY)
        texts = _as_list(row[name])
        attempts, grades = (_aligned(row, f"{source}_{part}", len(texts)) for part in ("attempt", "grade"))
        if f"{source}_attempt" in row:  # the release knows of a response, so an empty one is missing
            attempts = [attempt or "" for attempt in attempts]
        for text, attempt, grade in zip(texts, attempts, grades):
            correct = {"yes": True, "no": False}.get(grade.strip().lower()) if isinstance(grade, str) else grade
            if correct is not None and not isinstance(correct, bool):
                raise RowError(f"'{source}_grade' must be Yes or No, not {kind_of(grade)}")
            result.notes["grades other than Yes and No"] += correct is None and grade is not None
            result.add(text, repr(name), {"source": source, "correct": correct}, attempt)
    return result


def _openr1(row: Row, options: FormatOptions) -> PoolRow:
    """OpenR1-Math: all generations are DeepSeek-R1's; one is right if math-verify or the judging model says so."""
    result = _question(
        row, "problem", "openr1", {"problem_type": "subject", "source": "origin", "uuid": "uuid", "answer": "answer"}
    )
    texts = row.get("generations")
    if not isinstance(texts, list):
        raise RowError(f"'generations' must be a list of texts, not {kind_of(texts)}")
    verified, judged, complete = (
        _aligned(row, name, len(texts), flags=True)
        for name in ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    )
    for number, text in enumerate(texts):
        if complete[number] is False:
            result.left_out[UNFINISHED] += 1
            continue
        verdicts = {verified[number], judged[number]} - {None}
        facts = {"source": options.source or "deepseek-r1", "correct": any(verdicts) if verdicts else None}
        result.add(text, f"generation {number + 1}", facts)
    return result


def _openthoughts(row: Row, options: FormatOptions, source: str = "deepseek-r1") -> PoolRow:
    """A conversation whose last turn is the trace; rows with the same question become one set."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'conversations' must be a list of turns, not {kind_of(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or str(turn.get("from")) not in _ROLES:
            raise RowError(f"turn {number} of 'conversations' must be an object whose 'from' is {', '.join(_ROLES)}")
        text = (
            filled_string(turn.get("value"), f"'value' of turn {number}") if number < len(turns) else turn.get("value")
        )
        messages.append({"role": _ROLES[turn["from"]], "content": text})
    system = [turn for turn in messages if turn["role"] == "system"]
    if prompt_field := _text_in(row, "system"):
        system.insert(0, {"role": "system", "content": prompt_field})
    *dialogue, reply = [turn for turn in messages if turn["role"] != "system"] or messages
    if reply["role"] != "assistant" or not dialogue or dialogue[-1]["role"] != "user":
        raise RowError("'conversations' must end in a user turn and the assistant's reply")
    prompt = (system if options.keep_system else []) + dialogue
    question: Row = {"question": dialogue[0]["content"]} if len(prompt) == 1 else {"messages": prompt}
    question["id"] = f"openthoughts-{question_key(question)[:16]}"
    for name, new_name in (("domain", "subject"), ("difficulty", "difficulty"), ("source", "origin")):
        if isinstance(row.get(name), (str, int)):
            question[new_name] = row[name]
    result = PoolRow(question)
    result.notes["system prompts left out"] += bool(system) and not options.keep_system
    result.add(reply["content"], "the assistant's reply", {"source": options.source or source})
    return result


def _openthoughts3(row: Row, options: FormatOptions) -> PoolRow:
    """OpenThoughts3: sixteen replies of QwQ-32B to a question, one per row."""
    return _openthoughts(row, options, "qwq-32b")


def final_answer(solution: str) -> str | None:
    r"""Final answer of a solution: the content of its last \boxed{}, or all of it if it is one short line."""
    _, boxes = last_boxes(solution)
    if boxes:
        return boxes[-1].strip() or None
    text = solution.strip()
    return text if len(text) <= _MAX_ANSWER and "\n" not in text else None


def _question(row: Row, name: str, release: str, extra: dict[str, str]) -> PoolRow:
    """The question in the field `name` under an id made from its words, and the fields of `extra` under new names."""
    question: Row = {"question": filled_string(row.get(name), repr(name))}
    texts = {new: _text_in(row, old) for old, new in extra.items()}
    present = {name: text for name, text in texts.items() if text is not None}
    return PoolRow({"id": f"{release}-{question_key(question)[:16]}", **question, **present})


def _text_in(row: Row, name: str) -> str | None:
    """The text in a field; None where it is missing, blank or no text."""
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else None


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _aligned(row: Row, name: str, length: int, flags: bool = False) -> list[object]:
    """The list in the field `name`, one item a trace; nulls where the field is missing. Raises RowError."""
    values = row.get(name)
    if values is None:
        return [None] * length
    if flags and not (isinstance(values, list) and all(v is None or isinstance(v, bool) for v in values)):
        raise RowError(f"'{name}' must be a list of true and false, one per trace")
    values = _as_list(values)
    if len(values) != length:
        raise RowError(f"'{name}' has {len(values)} items for {length} traces")
    return values


FORMATS: dict[str, Callable[[Row, FormatOptions], PoolRow]] = {
    "project": _project,
    "s1k": _s1k,
    "openr1": _openr1,
    "openthoughts": _openthoughts,
    "openthoughts3": _openthoughts3,
}
"""Name -> reader of one row; it raises RowError."""


def detect_format(row: Row) -> str:
    """The format that a row's fields speak for. Raises RowError."""
    if "traces" in row:
        return "project"
    if any(name.endswith(_TRAJECTORY) for name in row):
        return "s1k"
    if "generations" in row:
        return "openr1"
    if "conversations" in row:
        return "openthoughts" if "system" in row or "domain" not in row else "openthoughts3"
    fields = ", ".join(sorted(row)[:12]) or "none"
    raise RowError(f"of none of the formats {', '.join(FORMATS)}; the fields are {fields}. Name it with --format")
