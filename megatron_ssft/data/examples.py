"""JSONL rows to validated SetExamples; what is wrong with the data is said here, before any GPU time is spent.

Which rows of which files, and which of their traces, is decided in reading.py.
"""

from __future__ import annotations

from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of, parse_json, plain_string
from megatron_ssft.records import Json, Message, SetExample, Trace

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
