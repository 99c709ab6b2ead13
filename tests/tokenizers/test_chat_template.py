"""Chat templates: rendered as transformers does, with a fixed date, within limits, and with every part of a row."""

from __future__ import annotations

import json
import os
import time

import pytest

from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.errors import UserError
from megatron_ssft.records import SetExample
from megatron_ssft.tokenizers import chat_template
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_models import CHATML, chatml_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"é": {}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
TOOLS_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function | tojson(indent=1) }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EACH = "{%% for m in messages %%}%s{%% endfor %%}"
FEATURES = {
    "chatml": CHATML,
    "tools": TOOLS_TEMPLATE,
    "generation": EACH % "{% generation %}{{ m.content }}{% endgeneration %}" + "{{ eos_token }}",
    "break": EACH % "{{ loop.index }}{{ m.content }}{% if loop.last %}{% break %}{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}" + EACH % "{% set ns.n = ns.n + 1 %}{{ m.content }}" + "{{ ns.n }}",
    "trim": EACH % "\n  {% if true %}\n    {{ m['content'] | trim }}\n  {% endif %}\n" + "\n",
    "macro": "{% macro show(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}" + EACH % "{{ show(m) }}",
    "strings": EACH % "{{ m.role.upper() }}: {{ m.content.split('\\n') | join('\\n') }}{{ '%d' % 3 }}",
}
ASSISTANT = {"role": "assistant", "content": "7", "reasoning_content": "hm", "tool_calls": [CALL]}


def tokenizer_of(folder, template, **rules):
    chatml_tokenizer(folder, template=template)
    if not rules:
        return build_tokenizer("HuggingFaceTokenizer", str(folder))
    from megatron_ssft.tokenizers.data_text import PromptRules

    return build_tokenizer("HuggingFaceTokenizer", str(folder), PromptRules(**rules))


def row(*messages, tools=None):
    return SetExample("q", "f", 1, (), messages=messages or ({"role": "user", "content": "hi"},), tools=tools)


@pytest.mark.parametrize("feature", FEATURES)
def test_templates_are_rendered_as_by_transformers(tmp_path, feature):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(tmp_path, FEATURES[feature])
    reference = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "system", "content": " Be\nbrief. "}, {"role": "user", "content": "1 < 2 & 'é' \"数\""}]
    cases = [(turns, None), (turns * 2, None)]
    if feature == "tools":
        cases.append(([turns[1], ASSISTANT, {"role": "tool", "content": "3"}, turns[1]], [TOOL]))
    for messages, tools in cases:
        ids = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(row(*messages, tools=None if tools is None else tuple(tools)), tokenizer) == ids


# -- what a row holds reaches the prompt, or is refused --------------------------------------------------------------


def test_tools_calls_and_reasoning_are_rendered(tmp_path):
    tokenizer = tokenizer_of(tmp_path, TOOLS_TEMPLATE)
    text = tokenizer.decode(
        encode_prompt(
            row({"role": "user", "content": "1+2?"}, ASSISTANT, {"role": "user", "content": "so?"}, tools=(TOOL,)),
            tokenizer,
        )
    )
    assert '"name": "add"' in text and '"b": "ü"' in text and "<think>hm</think>7" in text


FIRST, LAST = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
CALLING = {"role": "assistant", "content": "7", "tool_calls": [CALL]}
THINKING = {"role": "assistant", "content": "7", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    "part, example",
    [
        ("the row's 'tools'", row(tools=(TOOL,))),
        ("'tool_calls' of turn 2", row(FIRST, CALLING, LAST)),
        ("'reasoning_content' of turn 2", row(FIRST, THINKING, LAST)),
    ],
)
def test_what_a_template_leaves_out_is_refused(tmp_path, part, example):
    with pytest.raises(UserError, match=f"does not render {part}") as caught:
        encode_prompt(example, tokenizer_of(tmp_path, CHATML))
    assert "\n" not in str(caught.value)


def test_turns_that_a_template_drops_are_refused(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"
    )
    tokenizer = tokenizer_of(tmp_path, template)
    for role in ("human", "gpt", "system"):
        for content in ("Be brief.", "i"):  # the second is part of another turn's text
            with pytest.raises(UserError, match=f"does not render the content of turn 1.*{role}"):
                encode_prompt(row({"role": role, "content": content}, {"role": "user", "content": "hi"}), tokenizer)
    assert encode_prompt(row({"role": "assistant", "content": "x"}, {"role": "user", "content": "hi"}), tokenizer)


def test_content_that_a_template_shortens_is_refused(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML.replace("message['content']", "message['content'][:8]"))
    assert encode_prompt(row({"role": "user", "content": "short"}), tokenizer_of(tmp_path / "b", CHATML))
    with pytest.raises(UserError, match="content of turn 1"):
        encode_prompt(row({"role": "user", "content": "more than eight"}), tokenizer)


# -- the date --------------------------------------------------------------------------------------------------------

DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML


def test_a_template_with_todays_date_needs_a_fixed_one(tmp_path):
    with pytest.raises(UserError, match="writes today's date.*--template-date YYYY-MM-DD"):
        encode_prompt(row(), tokenizer_of(tmp_path, DATED))
    first = tokenizer_of(tmp_path, DATED, template_date="2024-07-26")
    assert first.decode(encode_prompt(row(), first)).startswith("Today is 26 Jul 2024.\n")
    second = tokenizer_of(tmp_path, DATED, template_date="2024-07-27")
    assert first.fingerprint() != second.fingerprint()
    again = tokenizer_of(tmp_path, DATED, template_date="2024-07-26")
    assert again.fingerprint() == first.fingerprint()


def test_the_cache_and_the_resume_tell_dates_apart(tmp_path):
    """The fingerprint of the tokenized data is what a resume compares."""
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.data.cache import SetDataset
    from megatron_ssft.objectives.sets import prepare_data
    from megatron_ssft.tokenizers.vocabulary import build_vocabulary

    chatml_tokenizer(tmp_path / "hf", template=DATED)
    (tmp_path / "a.jsonl").write_text('{"id": "a", "question": "1+1?", "traces": [{"text": "2"}]}\n')
    values = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8, "train_iters": 1}
    values |= {"data_path": [str(tmp_path / "a.jsonl")], "tokenizer_model": str(tmp_path / "hf")}
    values |= {"data_cache_path": str(tmp_path / "cache")}
    fingerprints = {}
    for date in ("2024-07-26", "2024-07-27", "2024-07-26"):
        config = build_config(values | {"template_date": date}, SSFTConfig)
        vocabulary = build_vocabulary(config.run)
        dataset = SetDataset.open(prepare_data(config, vocabulary)["train"])
        assert f"{date[-2:]} Jul 2024" in vocabulary.tokenizer.decode(dataset[0].prompt_ids)
        fingerprints.setdefault(date, dataset.fingerprint)
        assert fingerprints[date] == dataset.fingerprint
    assert len(set(fingerprints.values())) == 2
    with pytest.raises(UserError, match="a.jsonl:1: the chat template writes today's date"):
        config = build_config(values, SSFTConfig)
        prepare_data(config, build_vocabulary(config.run))


def test_a_date_that_no_template_asks_for_is_refused(tmp_path):
    with pytest.raises(UserError, match="--template-date 2024-07-26 has no use"):
        tokenizer_of(tmp_path, CHATML, template_date="2024-07-26")


def test_nothing_is_drawn_at_random(tmp_path):
    for number, template in enumerate(["{{ lipsum() }}", "{{ ['a', 'b'] | random }}"]):
        with pytest.raises(UserError, match="chat template refuses"):
            encode_prompt(row(), tokenizer_of(tmp_path / str(number), template + CHATML))


# -- templates that go wrong -----------------------------------------------------------------------------------------

WRONG = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ 1 % 0 }}": "ZeroDivisionError",
    "{{ messages + 1 }}": "TypeError: can only concatenate list",
    "{{ messages[0].content() }}": "TypeError",
    "{{ messages[9].role }}": "has no element 9",
    "{{ none.a.b }}": "'None' has no attribute 'a'",
    "{{ 'a' | int(base=99) + 'b' }}": "TypeError",
    "{{ 'a' * 10000000000 }}": "takes more memory",
    "{{ 'a' * 20000000 }}": "renders 20000052 characters, more than 16777216",
    "{{ '%10000000000d' % 1 }}": "memory",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{% if %}": "Expected an expression.*line 1",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}": "memory",
}


@pytest.mark.parametrize("template", WRONG)
def test_a_template_that_goes_wrong_is_one_line(tmp_path, template):
    with pytest.raises(UserError, match=WRONG[template]) as caught:
        encode_prompt(row(), tokenizer_of(tmp_path, template + CHATML))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_template_that_does_not_end_is_stopped_once_for_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    tokenizer = tokenizer_of(tmp_path, loop + CHATML)
    for _ in range(50):
        with pytest.raises(UserError, match="takes more than 1 s of computing"):
            encode_prompt(row(), tokenizer)


def test_the_process_that_renders_comes_back_after_it_ended(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML)
    before = encode_prompt(row(), tokenizer)
    ((template, _, _),) = tokenizer._conversations._templates.values()
    template._process.stdin.close()  # as after a time without requests
    template._process.wait()
    assert encode_prompt(row(), tokenizer) == before
    process = template._process
    del tokenizer, template
    for _ in range(600):
        if process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is not None and not os.path.exists(f"/proc/{process.pid}/exe")


def test_large_conversations_pass_through(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML)
    content = "é数🦆 " * 200_000
    ids = encode_prompt(row({"role": "user", "content": content}), tokenizer)
    assert content.strip() in tokenizer.decode(ids)
    assert json.dumps(content) != content
