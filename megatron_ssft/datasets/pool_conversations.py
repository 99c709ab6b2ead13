"""Training sets whose rows are conversations: the last turn is a trace; rows with the same question become one set."""

from __future__ import annotations

from typing import NamedTuple

from megatron_ssft.datasets.pool_rows import FormatOptions, PoolRow, optional_text
from megatron_ssft.datasets.tables import Row, question_key
from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class _Turns(NamedTuple):
    """How a release spells a conversation: names of the fields of the row and of a turn."""

    field: str
    role: str
    text: str


_SHAREGPT = _Turns("conversations", "from", "value")
_CHAT = _Turns("messages", "role", "content")


def openthoughts(row: Row, options: FormatOptions) -> PoolRow:
    """OpenThoughts and sets of its form: conversations of DeepSeek-R1, with a system prompt beside them."""
    return _conversation(row, options, _SHAREGPT, "openthoughts", "deepseek-r1")


def openthoughts3(row: Row, options: FormatOptions) -> PoolRow:
    """OpenThoughts3: sixteen replies of QwQ-32B to a question, one per row."""
    return _conversation(row, options, _SHAREGPT, "openthoughts", "qwq-32b")


def mixture_of_thoughts(row: Row, options: FormatOptions) -> PoolRow:
    """Mixture-of-Thoughts: chat messages of which the last is DeepSeek-R1's reply."""
    return _conversation(row, options, _CHAT, "mixture-of-thoughts", "deepseek-r1")


def _conversation(row: Row, options: FormatOptions, form: _Turns, release: str, source: str) -> PoolRow:
    messages = _turns(row, form)
    system = [turn for turn in messages if turn["role"] == "system"]
    if prompt_field := optional_text(row, "system"):
        system.insert(0, {"role": "system", "content": prompt_field})
    *dialogue, reply = [turn for turn in messages if turn["role"] != "system"] or messages
    if reply["role"] != "assistant" or not dialogue or dialogue[-1]["role"] != "user":
        raise RowError(f"'{form.field}' must end in a user turn and the assistant's reply")
    prompt = (system if options.keep_system else []) + dialogue
    question: Row = {"question": dialogue[0]["content"]} if len(prompt) == 1 else {"messages": prompt}
    question["id"] = f"{release}-{question_key(question)[:16]}"
    for name, new_name in (("domain", "subject"), ("difficulty", "difficulty"), ("source", "origin")):
        if isinstance(row.get(name), (str, int)):
            question[new_name] = row[name]
    result = PoolRow(question)
    result.notes["system prompts left out"] += bool(system) and not options.keep_system
    result.add(reply["content"], "the assistant's reply", {"source": options.source or source})
    return result


def _turns(row: Row, form: _Turns) -> list[Row]:
    """The turns with role and content; the content of the last may be missing. Raises RowError."""
    turns = row.get(form.field)
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'{form.field}' must be a list of turns, not {kind_of(turns)}")
    messages: list[Row] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or str(turn.get(form.role)) not in _ROLES:
            raise RowError(
                f"turn {number} of '{form.field}' must be an object whose '{form.role}' is {', '.join(_ROLES)}"
            )
        text = turn.get(form.text)
        if number < len(turns):
            text = filled_string(text, f"'{form.text}' of turn {number}")
        messages.append({"role": _ROLES[turn[form.role]], "content": text})
    return messages
