"""Chat template and token ids: the prompt of a question, and the completion of each trace.

`encode_prompt` renders a question through the tokenizer's chat template, `tokenize_examples` cuts sequences to
--seq-length. The tag between prompt and completion is put there later, at every step.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ssft.config import DataConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.records import ForkingTokens, Message, SetExample, TokenizedSet, Trace
from megatron_ssft.tokenizers.tokenizer import Tokenizer

WITHOUT_TEMPLATE = "questions without template"
IN_THOUGHT = "questions in thought"
_THOUGHT = re.compile(r"(<think>|\[THINK\])$", re.IGNORECASE)
"""Opens a thought, in the words of the families that have one."""
_TAIL = 32
"""Tokens of a prompt that are looked at for it."""


@dataclass(frozen=True)
class TokenizationReport:
    """Counters of tokenizing."""

    questions: int
    """Questions kept."""
    traces: int
    """Traces kept."""
    trace_count_histogram: dict[int, int]
    """Number of traces -> number of kept questions that have so many, ascending."""
    traces_truncated: int
    traces_dropped_overlong: int
    questions_dropped_overlong: int
    """Questions none of whose traces fits."""
    total_tokens: int
    """Prompts, once each, and completions."""
    longest_sequence: int
    """Prompt, longest tag and completion."""
    length_quantiles: list[int]
    """Entry k: the --seq-length at which k percent of the traces keep their end, for k = 0 to 100. Dropped ones count
    too."""
    traces_repeated: int
    """Traces that, as they are trained, equal an earlier one of their question."""
    answers_joined: int
    """Traces with an answer that the data keeps apart."""
    questions_without_template: int
    """Questions of chat turns that no template renders."""
    questions_in_thought: int
    """Questions whose rendered prompt ends with an opened <think>."""
    control_tokens_in_questions: int
    """Control tokens that questions spell; they are text."""
    control_tokens_in_traces: int
    """Control tokens that traces and answers spell; they are text."""
    control_tokens_in_prompts: int
    """Control tokens that verbatim prompts spell; --prompt-control-tokens says what they are."""


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


def tokenize_examples(
    examples: list[SetExample],
    tokenizer: Tokenizer,
    tags: ForkingTokens,
    data: DataConfig,
    seq_length: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[TokenizedSet], TokenizationReport]:
    """The sets under the rule len(prompt) + len(longest tag) + len(completion) <= --seq-length, and what was counted.

    `progress(done, total)` is called after every question. Raises one UserError for all rows that cannot be used, or
    if nothing is left.
    """
    wrong = WrongRows()
    counts: Counter[str] = Counter()
    spelled: Counter[str] = Counter()
    sets: list[TokenizedSet] = []
    lengths: list[int] = []
    longest_tag = max(len(ids) for ids in tags.ids)
    for done, example in enumerate(examples, start=1):
        try:
            tokenized = _tokenize_set(example, tokenizer, longest_tag, data, seq_length, counts, lengths)
            spelled += count_control_tokens(example, tokenizer)
        except UserError as error:
            wrong.add(example.file, example.line, error)
        else:
            sets += [tokenized] if tokenized.num_traces else []
        if progress is not None:
            progress(done, len(examples))
    wrong.raise_if_any()
    if not sets:
        raise UserError(
            f"--overlong-traces drop: no trace of {len(examples)} questions fits --seq-length {seq_length}; "
            "raise --seq-length or choose truncate"
        )
    trace_counts = Counter(s.num_traces for s in sets)
    return sets, TokenizationReport(
        questions=len(sets),
        traces=sum(s.num_traces for s in sets),
        trace_count_histogram=dict(sorted(trace_counts.items())),
        traces_truncated=counts["truncated"],
        traces_dropped_overlong=counts["dropped"],
        questions_dropped_overlong=len(examples) - len(sets),
        total_tokens=sum(len(a) for s in sets for a in (s.prompt_ids, *s.completion_ids)),
        longest_sequence=max(len(s.prompt_ids) + longest_tag + len(c) for s in sets for c in s.completion_ids),
        length_quantiles=_quantiles(lengths),
        traces_repeated=counts["repeated"],
        answers_joined=counts["answers"],
        questions_without_template=counts[WITHOUT_TEMPLATE],
        questions_in_thought=counts[IN_THOUGHT],
        control_tokens_in_questions=spelled["questions"],
        control_tokens_in_traces=spelled["traces"],
        control_tokens_in_prompts=spelled["prompts"],
    )


def _quantiles(lengths: list[int]) -> list[int]:
    """Of at least k percent of the lengths entry k is an upper bound, for k = 0 to 100."""
    ascending = sorted(lengths)
    return [ascending[max(0, math.ceil(k * len(ascending) / 100) - 1)] for k in range(101)]


def _tokenize_set(
    example: SetExample,
    tokenizer: Tokenizer,
    longest_tag: int,
    data: DataConfig,
    seq_length: int,
    counts: Counter[str],
    lengths: list[int],
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
