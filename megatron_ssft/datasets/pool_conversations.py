"""Training sets whose rows are conversations: the last turn is a trace; rows with the same question become one set."""

from __future__ import annotations

from megatron_ssft.datasets.pool_rows import FormatOptions, PoolRow, optional_text
from megatron_ssft.datasets.tables import Row, question_key
from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def openthoughts(row: Row, options: FormatOptions, source: str = "deepseek-r1") -> PoolRow:
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
    if prompt_field := optional_text(row, "system"):
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


def openthoughts3(row: Row, options: FormatOptions) -> PoolRow:
    """OpenThoughts3: sixteen replies of QwQ-32B to a question, one per row."""
    return openthoughts(row, options, "qwq-32b")
