"""Every part of a row that shapes a prompt reaches it, or the row is refused by its place."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.data.questions import read_questions
from megatron_ssft.data.reading import read_examples
from megatron_ssft.errors import UserError
from megatron_ssft.tokenizers.tokenizer import CharTokenizer

TOOL = {"type": "function", "function": {"name": "add"}}
USER = {"role": "user", "content": "hi"}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps({"id": "q", "traces": [{"text": "t"}]} | row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path):
    return read_examples([path], num_tags=None, max_traces=None, trace_filter=None, seed=1)[0]


def test_a_system_field_is_the_first_turn(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    for form in ({"question": "hi"}, {"messages": [USER]}):
        path = write(tmp_path / "a.jsonl", {"system": "Be brief."} | form)
        assert read(path)[0].messages == (system, USER) == read_questions(path)[0].messages
    text = CharTokenizer().decode(encode_prompt(read(path)[0], CharTokenizer()))
    assert text == "system: Be brief.\nuser: hi\n"


def test_tools_calls_and_reasoning_travel_with_the_row(tmp_path):
    turns = [USER, {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [TOOL]}]
    turns += [{"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}, USER]
    path = write(tmp_path / "a.jsonl", {"messages": turns, "tools": [TOOL]})
    for example in (read(path)[0], read_questions(path)[0]):
        assert example.tools == (TOOL,)
        assert example.messages[1] == {"role": "assistant", "reasoning_content": "r", "tool_calls": [TOOL]}
        assert example.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "a", "functions": [TOOL]}, "'functions' would not reach the prompt"),
        ({"question": "a", "documents": [{"text": "x"}]}, "'documents' would not reach the prompt"),
        ({"question": "a", "conversations": [USER]}, "'conversations' would not reach"),
        ({"question": "a", "system_prompt": "x"}, "'system_prompt' would not reach the prompt; call it 'system'"),
        ({"question": "a", "chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs' would not reach"),
        ({"question": "a", "tools": "add"}, "'tools' must be a list of objects"),
        ({"question": "a", "tools": [{"name": "\ud800"}]}, "'tools' holds half of a surrogate pair"),
        ({"question": "a", "system": 3}, "'system' must be a string"),
        ({"prompt": "a", "system": "x"}, "'system' does not go with a verbatim 'prompt'"),
        ({"prompt": "a", "tools": [TOOL]}, "'tools' do not go with a verbatim 'prompt'"),
        ({"messages": [{"role": "system", "content": "y"}, USER], "system": "x"}, "keep one of them"),
        ({"messages": [USER | {"weight": 0}]}, "'weight' of turn 1 reaches no chat template"),
        ({"messages": [USER | {"tool_calls": 3}]}, "'tool_calls' of turn 1 must be a list of objects"),
        ({"messages": [{"role": "assistant"}, USER]}, "'content' of turn 1 is missing"),
        ({"question": "a", "traces": [{"text": "t", "reasoning_content": "r"}]}, "'reasoning_content' of trace 1"),
        ({"question": "a", "traces": [{"text": "t", "tool_calls": [TOOL]}]}, "'tool_calls' of trace 1"),
    ],
)
def test_what_would_be_lost_is_refused_by_its_place(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:1: ") and reason in str(caught.value)


@pytest.mark.parametrize(
    "line, key",
    [
        ('{"id": "q", "question": "a", "question": "b", "traces": [{"text": "t"}]}', "question"),
        ('{"id": "q", "question": "a", "traces": [{"text": "t", "text": "u"}]}', "text"),
        ('{"id": "q", "id": "q", "question": "a", "traces": [{"text": "t"}]}', "id"),
        (
            '{"id": "q", "messages": [{"role": "user", "content": "a", "content": "b"}], "traces": [{"text": "t"}]}',
            "content",
        ),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, line, key):
    path = write(tmp_path / "a.jsonl", line)
    for reader in (read, read_questions):
        with pytest.raises(UserError, match=f"a.jsonl:1: key '{key}' is given twice"):
            reader(path)


@pytest.mark.parametrize("fields", [{"tools": [TOOL]}, {"messages": [USER | {"name": "x"}], "question": None}])
def test_without_a_chat_template_only_text_can_be_shown(tmp_path, fields):
    example = read(write(tmp_path / "a.jsonl", {"question": "a"} | fields))[0]
    with pytest.raises(UserError, match="chat template, and the tokenizer has none"):
        encode_prompt(example, CharTokenizer())
