"""What became of the data on its way to training, in words; and the refusal of data that lost most of its ends."""

from __future__ import annotations

import math

from megatron_ssft.config import DataConfig
from megatron_ssft.data.cache import DataSummary
from megatron_ssft.errors import UserError


def share_of(count: int, total: int, what: str) -> str:
    """`3 of 12 traces (25.0%)`."""
    return f"{count} of {total} {what} ({count / total:.1%})"


def account(summary: DataSummary, data: DataConfig, seq_length: int) -> list[str]:
    """A line for everything that training sees otherwise than the files have it; none where nothing is."""
    s = summary
    dropped = s.traces_dropped_overlong
    traces = s.traces + dropped + s.traces_filtered + s.traces_sampled_out
    questions = s.questions + s.questions_dropped + s.questions_dropped_overlong
    fits = f"--seq-length {s.length_quantiles[100]} holds the longest"
    lines = [
        (s.traces_filtered, traces, "traces", f"do not match --trace-filter {data.trace_filter} and are left out"),
        (s.traces_sampled_out, traces, "traces", f"are beyond --max-traces {data.max_traces} and are left out"),
        (dropped, traces, "traces", f"are dropped: they do not fit --seq-length {seq_length}; {fits}"),
        (questions - s.questions, questions, "questions", "are left out, as no trace of them is left"),
        (s.traces_truncated, s.traces, "traces", f"are truncated at --seq-length {seq_length}; {fits}"),
        (s.answers_joined, s.traces + dropped, "traces", _joined(data)),
        (s.traces_repeated, s.traces, "traces", "equal another one of their question token for token, as trained"),
    ]
    texts = [f"{share_of(count, total, what)} {fate}" for count, total, what, fate in lines if count]
    tokenized = s.questions + s.questions_dropped_overlong
    texts += account_rendering(s.questions_without_template, s.questions_in_thought, tokenized)
    return texts


def account_rendering(without_template: int, in_thought: int, questions: int) -> list[str]:
    """A line for questions that no template renders, and one for those whose template opens a thought."""
    texts = []
    if without_template:
        plain = share_of(without_template, questions, "questions")
        texts.append(f"no chat template: {plain} are rendered as plain text")
    if in_thought:
        opened = share_of(in_thought, questions, "questions")
        texts.append(f"the chat template opens <think> itself in {opened}; the tag follows it")
    return texts


def _joined(data: DataConfig) -> str:
    return f"have an answer of their own, joined to the text by --answer-separator {data.answer_separator!r}"


def refuse_truncated(summary: DataSummary, most: float, seq_length: int, files: str) -> None:
    """Raise UserError where a larger share of the traces than `most` loses its end to --seq-length.

    Args:
        files: the paths that the traces come from.
    """
    s = summary
    if s.traces_truncated <= most * s.traces:
        return
    enough = s.length_quantiles[min(100, math.ceil(100 * (1 - most)))]
    raise UserError(
        f"{files}: {share_of(s.traces_truncated, s.traces, 'traces')} lose their end to --seq-length {seq_length}, "
        f"more than --max-truncated-share {most:g} allows; --seq-length {enough} is enough for that, --seq-length "
        f"{s.length_quantiles[100]} holds all; or choose --overlong-traces drop, or a larger share"
    )
