"""Chat template and token ids: the prompt of a question, and the completion of each trace.

`encode_prompt` renders a question through the tokenizer's chat template, `tokenize_set` cuts sequences to
--seq-length. The tag between prompt and completion is put there later, at every step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import MutableSequence

import numpy as np

from megatron_ssft.config import DataConfig
from megatron_ssft.formats.jsonl import RowError
from megatron_ssft.records import Message, SetExample, TokenizedSet, Trace
from megatron_ssft.tokenizers.tokenizer import Tokenizer

WITHOUT_TEMPLATE = "questions without template"
IN_THOUGHT = "questions in thought"
_THOUGHT = re.compile(r"(<think>|\[THINK\])$", re.IGNORECASE)
"""Opens a thought, in the words of the families that have one."""
_TAIL = 32
"""Tokens of a prompt that are looked at for it."""


def encode_prompt(example: SetExample, tokenizer: Tokenizer) -> list[int]:
    """Ids up to and including the generation prompt; the forking token follows.

    A verbatim `prompt` skips the chat template; messages go through it, or through `plain_rendering` where the
    tokenizer has none. Control tokens that messages spell are text. Raises UserError where the template refuses the
    messages or leaves a part out, and for a verbatim prompt whose control tokens nothing explains.
    """
    if example.prompt is not None:
        return _with_bos(tokenizer.encode_verbatim(example.prompt), tokenizer)
    assert example.messages, f"{example.file}:{example.line} has neither prompt nor messages"
    rendered = tokenizer.render_chat(example.messages, example.tools)
    if rendered is not None:
        return rendered
    if example.tools:
        raise RowError("'tools' need a chat template, and the tokenizer has none; remove them from the row")
    return _with_bos(tokenizer.encode_text(plain_rendering(example.messages)), tokenizer)


def plain_rendering(messages: tuple[Message, ...]) -> str:
    """Chat turns as text without a template: a lone turn is its content, several are `role: content` lines.

    Raises RowError for a turn with more than role and content.
    """
    for number, turn in enumerate(messages, start=1):
        others = sorted(turn.keys() - {"role", "content"})
        if others:
            raise RowError(
                f"{others[0]!r} of turn {number} needs a chat template, and the tokenizer has none; remove it"
            )
    if len(messages) == 1:
        return messages[0].get("content", "") + "\n"
    return "".join(f"{turn['role']}: {turn.get('content', '')}\n" for turn in messages)


def encode_completion(trace: Trace, tokenizer: Tokenizer, answer_separator: str) -> list[int]:
    """Ids that follow the forking token: the reasoning, the answer where the data keeps it apart, end of turn."""
    if not trace.answer:
        return [*tokenizer.encode_text(trace.text), tokenizer.eos_id]
    if tokenizer.control_tokens_in(answer_separator):  # a setting, and meant so
        separator = tokenizer.encode(answer_separator)
        ids = [*tokenizer.encode_text(trace.text), *separator, *tokenizer.encode_text(trace.answer)]
        return [*ids, tokenizer.eos_id]
    return [*tokenizer.encode_text(trace.text + answer_separator + trace.answer), tokenizer.eos_id]


def count_control_tokens(example: SetExample, tokenizer: Tokenizer) -> Counter[str]:
    """How many control tokens the parts of a row spell: `questions`, `traces`, `prompts` (verbatim)."""
    counts: Counter[str] = Counter()
    if example.prompt is not None:
        counts["prompts"] = tokenizer.control_tokens_in(example.prompt)
    else:
        counts["questions"] = tokenizer.control_tokens_in_chat(example.messages or (), example.tools)
    texts = (text for trace in example.traces for text in (trace.text, trace.answer or ""))
    counts["traces"] = sum(map(tokenizer.control_tokens_in, texts))
    return counts


def control_token_notes(questions: int, traces: int, prompts: int, prompts_as: str, where: str = "data") -> list[str]:
    """What a start says of control tokens that the data spells; nothing where there are none.

    Args:
        questions, traces, prompts: their numbers.
        prompts_as: what they are in verbatim prompts, a value of --prompt-control-tokens.
        where: which data.
    """
    notes = []
    if questions or traces:
        notes.append(f"{where}: control tokens spelled in questions: {questions}, in traces: {traces}; text there")
    if prompts:
        notes.append(f"{where}: control tokens spelled in verbatim prompts: {prompts}; taken as {prompts_as}")
    return notes


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Prepends the begin-of-text token, unless the text spells it itself."""
    bos = tokenizer.bos_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def tokenize_set(
    example: SetExample,
    tokenizer: Tokenizer,
    longest_tag: int,
    data: DataConfig,
    seq_length: int,
    counts: Counter[str],
    lengths: MutableSequence[int],
) -> TokenizedSet:
    """One set under the --seq-length rule, maybe without traces under `drop`. Raises RowError.

    What happens is added to `counts`, the length that each trace needs to `lengths`.
    """
    prompt = encode_prompt(example, tokenizer)
    count_rendering(example, prompt, tokenizer, counts)
    room = seq_length - len(prompt) - longest_tag
    if not prompt:
        raise RowError(f"the tokenizer makes no token of the prompt of question {example.id!r}")
    if room < 1:
        raise RowError(
            f"prompt of question {example.id!r} is {len(prompt)} tokens, with its tag it leaves no room in "
            f"--seq-length {seq_length}; raise --seq-length or remove the row"
        )
    completions, sources, truncated = [], [], 0
    for number, trace in enumerate(example.traces, start=1):
        completion = encode_completion(trace, tokenizer, data.answer_separator)
        counts["answers"] += bool(trace.answer)
        lengths.append(seq_length - room + len(completion))
        if len(completion) == 1:
            raise RowError(f"the tokenizer makes no token of trace {number} of question {example.id!r}")
        if len(completion) > room:
            if data.overlong_traces == "refuse":
                raise RowError(
                    f"a trace of question {example.id!r} is {len(completion)} tokens, with prompt and tag "
                    f"{seq_length - room + len(completion)}, more than --seq-length {seq_length}; raise "
                    "--seq-length or choose --overlong-traces truncate or drop"
                )
            if data.overlong_traces == "drop":
                counts["dropped"] += 1
                continue
            counts["truncated"] += 1
            truncated += 1
        completions.append(np.array(completion[:room], dtype=np.int32))
        sources.append(trace.source)
    counts["repeated"] += len(completions) - len({completion.tobytes() for completion in completions})
    return TokenizedSet(
        id=example.id,
        file=example.file,
        line=example.line,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=tuple(completions),
        sources=tuple(sources),
        truncated=truncated,
    )


def count_rendering(example: SetExample, prompt: list[int], tokenizer: Tokenizer, counts: Counter[str]) -> None:
    """Count a question of chat turns that has no template, or one that opens a thought before the tag."""
    if example.messages is None:
        return
    if not tokenizer.has_template:
        counts[WITHOUT_TEMPLATE] += 1
    elif _THOUGHT.search(tokenizer.decode(prompt[-_TAIL:]).rstrip()):
        counts[IN_THOUGHT] += 1
