"""Sets to token ids one after the other, and what is counted on the way."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ssft.config import DataConfig
from megatron_ssft.data.prompt import IN_THOUGHT, WITHOUT_TEMPLATE, count_control_tokens, tokenize_set
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import WrongRows
from megatron_ssft.records import ForkingTokens, SetExample, TokenizedSet
from megatron_ssft.tokenizers.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class Rules:
    """What becomes of a set: len(prompt) + len(longest tag) + len(completion) <= --seq-length."""

    longest_tag: int
    seq_length: int
    data: DataConfig


def rules_of(tags: ForkingTokens, data: DataConfig, seq_length: int) -> Rules:
    """The rules for these tags."""
    return Rules(max(map(len, tags.ids)), seq_length, data)


@dataclass
class Tally:
    """What was counted over some sets; the counts of several parts of the data add up."""

    examples: int = 0
    """Questions that were looked at."""
    total_tokens: int = 0
    longest_sequence: int = 0
    trace_counts: Counter[int] = field(default_factory=Counter)
    """Number of traces -> kept questions that have so many."""
    counts: Counter[str] = field(default_factory=Counter)
    spelled: Counter[str] = field(default_factory=Counter)
    needs: array[int] = field(default_factory=lambda: array("q"))
    """For each trace the --seq-length that it needs; those that are dropped too."""

    def add(self, kept: TokenizedSet, longest_tag: int) -> None:
        """Count one set that is kept."""
        prompt, lengths = len(kept.prompt_ids), [len(ids) for ids in kept.completion_ids]
        self.trace_counts[len(lengths)] += 1
        self.total_tokens += prompt + sum(lengths)
        self.longest_sequence = max(self.longest_sequence, prompt + longest_tag + max(lengths))

    def merge(self, other: Tally) -> None:
        """Count what another one has counted as well."""
        self.examples += other.examples
        self.total_tokens += other.total_tokens
        self.longest_sequence = max(self.longest_sequence, other.longest_sequence)
        self.trace_counts += other.trace_counts
        self.counts += other.counts
        self.spelled += other.spelled
        self.needs.extend(other.needs)

    def report(self, seq_length: int) -> TokenizationReport:
        """The counters of a whole data set. Raises UserError if nothing is left of it."""
        questions = self.trace_counts.total()
        if not questions:
            raise UserError(
                f"--overlong-traces drop: no trace of {self.examples} questions fits --seq-length {seq_length}; "
                "raise --seq-length or choose truncate"
            )
        return TokenizationReport(
            questions=questions,
            traces=sum(count * number for count, number in self.trace_counts.items()),
            trace_count_histogram=dict(sorted(self.trace_counts.items())),
            traces_truncated=self.counts["truncated"],
            traces_dropped_overlong=self.counts["dropped"],
            questions_dropped_overlong=self.examples - questions,
            total_tokens=self.total_tokens,
            longest_sequence=self.longest_sequence,
            length_quantiles=_quantiles(self.needs),
            traces_repeated=self.counts["repeated"],
            answers_joined=self.counts["answers"],
            questions_without_template=self.counts[WITHOUT_TEMPLATE],
            questions_in_thought=self.counts[IN_THOUGHT],
            control_tokens_in_questions=self.spelled["questions"],
            control_tokens_in_traces=self.spelled["traces"],
            control_tokens_in_prompts=self.spelled["prompts"],
        )


def _quantiles(lengths: Sequence[int]) -> list[int]:
    """Of at least k percent of the lengths entry k is an upper bound, for k = 0 to 100."""
    ascending = np.sort(np.asarray(lengths, dtype=np.int64))
    return [int(ascending[max(0, math.ceil(k * len(ascending) / 100) - 1)]) for k in range(101)]


def tokenize_each(
    examples: Iterable[SetExample],
    tokenizer: Tokenizer,
    rules: Rules,
    tally: Tally,
    wrong: WrongRows,
    done: Callable[[], None],
) -> Iterator[TokenizedSet]:
    """The sets of which a trace is left, one at a time; rows that cannot be used are added to `wrong`.

    `done()` is called after every question.
    """
    for example in examples:
        tally.examples += 1
        try:
            tokenized = tokenize_set(
                example, tokenizer, rules.longest_tag, rules.data, rules.seq_length, tally.counts, tally.needs
            )
            tally.spelled += count_control_tokens(example, tokenizer)
        except UserError as error:
            wrong.add(example.file, example.line, error)
        else:
            if tokenized.num_traces:
                tally.add(tokenized, rules.longest_tag)
                yield tokenized
        done()
