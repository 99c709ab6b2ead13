"""JSONL rows to validated SetExamples; what is wrong with the data is said here, before any GPU time is spent."""

from __future__ import annotations

import codecs
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike

from megatron_ssft.data.trace_filter import TraceFilter
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows, filled_string, kind_of, parse_json, plain_string
from megatron_ssft.records import Json, Message, SetExample, Trace
from megatron_ssft.seeded import text_digest

_PROMPT_FIELDS = ("prompt", "question", "messages")
_TURN_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
_UNREAD = {
    "conversations": "write the turns as 'messages', with role and content",
    "chat_template_kwargs": "no row changes how the template renders; remove it",
    "documents": "put them into the question",
    "functions": "describe them in 'tools'",
    "function_call": "call tools in 'tool_calls' of a turn",
    "system_prompt": "call it 'system'",
}
"""Fields that other programs make a part of the prompt, and what to do instead."""
_UNREAD_IN_TRACE = ("reasoning_content", "reasoning", "thinking", "content", "messages", "tool_calls")
"""Fields of a trace that hold what a model shall write in other programs."""


@dataclass
class ReadReport:
    """Counters of reading: questions and traces that stayed, and those left out."""

    questions: int = 0
    """Questions kept."""
    traces: int = 0
    """Traces kept."""
    questions_dropped: int = 0
    """Questions none of whose traces passed the filter."""
    traces_filtered: int = 0
    """Traces that did not pass the filter."""
    traces_sampled_out: int = 0
    """Traces beyond --max-traces."""
    trace_count_histogram: dict[int, int] = field(default_factory=dict)
    """Number of traces -> number of kept questions that have so many, ascending."""


def read_examples(
    paths: Sequence[str | PathLike[str]],
    *,
    num_tags: int | None,
    max_traces: int | None,
    trace_filter: TraceFilter | None,
    seed: int,
) -> tuple[list[SetExample], ReadReport]:
    """All questions of the files, in file and line order, filtered first and then sampled to `max_traces`.

    `num_tags` is N, the largest allowed number of kept traces (None: any). The sample of a question depends on
    `seed` and its id alone. Raises one UserError for all wrong rows of all files, or for a filter that keeps nothing.
    """
    wrong = WrongRows()
    report = ReadReport()
    examples: list[SetExample] = []
    first_use: dict[str, str] = {}
    for path in paths:
        rows = 0
        try:
            for line, raw in _numbered_rows(path):
                rows += 1
                try:
                    example = parse_row(raw, str(path), line)
                    if example.id in first_use:
                        raise RowError(
                            f"id {example.id!r} is already used at {first_use[example.id]}; ids must be unique"
                        )
                    first_use[example.id] = f"{path}:{line}"
                    selected = _select(example, trace_filter, max_traces, seed, report)
                    _check_num_traces(selected, num_tags)
                except RowError as error:
                    wrong.add(path, line, error)
                else:
                    examples += [selected] if selected.traces else []
        except OSError as error:
            wrong.add_unreadable(path, error)
            continue
        if rows == 0:
            wrong.add(path, 1, "the file is empty; expected one JSON object a line")
    wrong.raise_if_any()
    if not examples:
        raise UserError(
            f"--trace-filter {trace_filter}: none of the {report.traces_filtered} traces in "
            f"{', '.join(map(str, paths))} matches; loosen the filter"
        )
    report.questions = len(examples)
    counts = Counter(len(example.traces) for example in examples)
    report.traces = sum(m * n for m, n in counts.items())
    report.trace_count_histogram = dict(sorted(counts.items()))
    return examples, report


def _numbered_rows(path: str | PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their 1-based numbers; only a line feed ends a line. Raises OSError."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield line, raw


def _select(
    example: SetExample, trace_filter: TraceFilter | None, max_traces: int | None, seed: int, report: ReadReport
) -> SetExample:
    """`example` with the traces that stay (maybe none); what goes is counted in `report`."""
    traces = example.traces
    if trace_filter is not None:
        traces = tuple(trace for trace in traces if trace_filter.matches(trace))
        report.traces_filtered += len(example.traces) - len(traces)
        report.questions_dropped += not traces
    if max_traces is not None and len(traces) > max_traces:
        report.traces_sampled_out += len(traces) - max_traces
        # Ranking by hash instead of a generator: the same everywhere, and a smaller K is a subset of a larger one.
        ranked = sorted(range(len(traces)), key=lambda j: text_digest(seed, j, example.id, joined_by="\n"))
        traces = tuple(traces[j] for j in sorted(ranked[:max_traces]))
    return dataclasses.replace(example, traces=traces)


def _check_num_traces(example: SetExample, num_tags: int | None) -> None:
    if num_tags is not None and len(example.traces) > num_tags:
        raise RowError(
            f"question {example.id!r} has {len(example.traces)} traces but there are only {num_tags} forking tokens; "
            "raise --num-forking-tokens or sample with --max-traces"
        )


def parse_row(raw: bytes, file: str, line: int) -> SetExample:
    """One line of the file. Raises RowError with the first thing that is wrong with it."""
    row = parse_json(raw)
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {kind_of(row)}")
    present = [name for name in _PROMPT_FIELDS if row.get(name) is not None]
    row_id = _parse_id(row)
    if len(present) != 1:
        listing = " and ".join(map(repr, present)) if present else "none of them"
        raise RowError(f"give exactly one of 'prompt', 'question' and 'messages'; found {listing}")
    for name, advice in _UNREAD.items():
        if row.get(name) is not None:
            raise RowError(f"{name!r} would not reach the prompt; {advice}")
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    if present == ["messages"]:
        messages = _parse_messages(row["messages"])
    elif present == ["question"]:
        messages = ({"role": "user", "content": filled_string(row["question"], "'question'")},)
    else:
        prompt = filled_string(row["prompt"], "'prompt'")
    messages, tools = _with_system(row.get("system"), messages), _parse_tools(row.get("tools"), messages)
    return SetExample(
        id=row_id,
        file=file,
        line=line,
        traces=_parse_traces(row.get("traces")),
        prompt=prompt,
        messages=messages,
        tools=tools,
        answer=_optional_string(row.get("answer"), "'answer'"),
    )


def _parse_id(row: dict[str, object]) -> str:
    value = row.get("id")
    if value is None:
        raise RowError("'id' is missing; give every question its own")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return filled_string(value, "'id'")


def _with_system(value: object, messages: tuple[Message, ...] | None) -> tuple[Message, ...] | None:
    """The turns, a row's `system` first. Raises RowError."""
    if value is None:
        return messages
    if messages is None:
        raise RowError("'system' does not go with a verbatim 'prompt'; write it into the prompt")
    if messages[0]["role"] == "system":
        raise RowError("'system' is given, and 'messages' begin with a system turn as well; keep one of them")
    return ({"role": "system", "content": plain_string(value, "'system'")}, *messages)


def _parse_tools(value: object, messages: tuple[Message, ...] | None) -> tuple[Json, ...] | None:
    """Raises RowError."""
    if value is None:
        return None
    if messages is None:
        raise RowError("'tools' do not go with a verbatim 'prompt'; write them into the prompt")
    return tuple(_objects(value, "'tools'")) or None


def _objects(value: object, what: str) -> list[Json]:
    """A list of JSON objects whose texts can be encoded. Raises RowError led by `what`."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{what} must be a list of objects")
    _check_texts(value, what)
    return value


def _check_texts(value: object, what: str) -> None:
    if isinstance(value, str):
        plain_string(value, what)
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else [*value.keys(), *value.values()]:
            _check_texts(item, what)


def _parse_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError(f"'messages' must be a list of turns, not {kind_of(value)}")
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} of 'messages' must be an object with role and content, not {kind_of(turn)}")
        turns.append(_parse_turn(turn, number))
    if turns[-1]["role"] != "user":
        raise RowError(f"'messages' must end in a user turn, not in one of role {turns[-1]['role']!r}")
    filled_string(turns[-1].get("content"), f"'content' of turn {len(turns)}")
    return tuple(turns)


def _parse_turn(turn: dict[str, object], number: int) -> Message:
    """Raises RowError."""
    given = {key: value for key, value in turn.items() if value is not None}
    unread = sorted(given.keys() - set(_TURN_FIELDS))
    if unread:
        raise RowError(f"{unread[0]!r} of turn {number} reaches no chat template; remove it, or put it into 'content'")
    role = filled_string(given.get("role"), f"'role' of turn {number}")
    parsed: Message = {"role": role}
    if "content" in given or not given.get("tool_calls"):
        parsed["content"] = plain_string(given.get("content"), f"'content' of turn {number}")
    if "reasoning_content" in given:
        parsed["reasoning_content"] = plain_string(given["reasoning_content"], f"'reasoning_content' of turn {number}")
    if "tool_call_id" in given:
        parsed["tool_call_id"] = plain_string(given["tool_call_id"], f"'tool_call_id' of turn {number}")
    if "name" in given:
        parsed["name"] = plain_string(given["name"], f"'name' of turn {number}")
    if "tool_calls" in given:
        parsed["tool_calls"] = _objects(given["tool_calls"], f"'tool_calls' of turn {number}")
    return parsed


def _parse_traces(value: object) -> tuple[Trace, ...]:
    if value is None:
        raise RowError("'traces' is missing")
    if not isinstance(value, list):
        raise RowError(f"'traces' must be a list, not {kind_of(value)}")
    if not value:
        raise RowError("'traces' is empty; a question needs at least one trace")
    traces = []
    for number, trace in enumerate(value, start=1):
        if not isinstance(trace, dict):
            raise RowError(f"trace {number} must be an object with 'text', not {kind_of(trace)}")
        for name in _UNREAD_IN_TRACE:
            if trace.get(name) is not None:
                raise RowError(f"{name!r} of trace {number} would not be trained; put what it holds into 'text'")
        correct = trace.get("correct")
        if correct is not None and not isinstance(correct, bool):
            raise RowError(f"'correct' of trace {number} must be true or false, not {kind_of(correct)}")
        traces.append(
            Trace(
                text=filled_string(trace.get("text"), f"'text' of trace {number}"),
                source=_optional_string(trace.get("source"), f"'source' of trace {number}"),
                correct=correct,
                answer=_optional_string(trace.get("answer"), f"'answer' of trace {number}"),
            )
        )
    return tuple(traces)


def _optional_string(value: object, what: str) -> str | None:
    return None if value is None else plain_string(value, what)
