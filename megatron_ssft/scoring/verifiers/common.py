"""Shared by all verifiers: their contract, result and settings, and where in a text the answer is looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_ssft.scoring.sandbox.inside.specification import Mechanism

Question = Mapping[str, object]
"""A row of the questions file."""


class UnusableQuestion(ValueError):
    """The question holds no answer that this verifier can judge by; the text says why, without the place."""


@dataclass(frozen=True)
class Settings:
    """How to judge; the limits hold for one rollout, with code for one program."""

    answer_after: str | None = None
    """Only what follows the last occurrence of this text is looked at; without one there is no answer."""
    timeout: float = 10.0
    """Seconds."""
    memory_mb: int = 1024
    mechanism: Mechanism | None = None
    """Code: what `mechanisms.choose` returned, or None to run programs under resource limits alone."""
    processor: int = 0
    """Code: the processor to use."""
    float_tolerance: float = 0.0
    """Code: how far a number may be off, relative to the larger of 1 and its size; 0: numbers must be equal."""


@dataclass(frozen=True)
class Judgement:
    """What a verifier says of one rollout."""

    verdict: str
    """`correct`, `wrong`, `no answer`, `timeout`, `memory`, `crash: ...`, ..."""
    answer: str | None
    """What was taken for the final answer."""

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"


class Verifier(Protocol):
    """A module that judges texts."""

    def check_question(self, question: Question, /) -> None:
        """Raises UnusableQuestion where there is nothing to judge by."""

    def judge(self, text: str, question: Question, settings: Settings, /) -> Judgement:
        """Judge a text by a question that `check_question` accepted. Raises nothing, whatever the text is."""


NO_ANSWER = Judgement("no answer", None)


def wrong_or_correct(is_correct: bool, answer: str) -> Judgement:
    """Make the judgement of an answer that was found."""
    return Judgement("correct" if is_correct else "wrong", answer)


def answer_part(text: str, answer_after: str | None) -> str | None:
    """Cut out where to look for the answer; None where `answer_after` is given and does not occur.

    That is after `answer_after` (up to the closing tag, where it ends with a tag), else after the last closing think
    tag, or before it if nothing follows.
    """
    if answer_after:
        _, separator, rest = text.rpartition(answer_after)
        if opening := re.search(r"<(\w+)>\s*\Z", answer_after):
            rest = rest.partition(f"</{opening[1]}>")[0]
        return rest if separator else None
    if answer_after is None:
        start = text.rfind("</think")
        end = text.find(">", start, start + 40) if start >= 0 else -1
        if end >= 0:
            return text[end + 1 :] if text[end + 1 :].strip() else text[:start]
    return text


def tagged_answer(part: str) -> str | None:
    """Cut out what stands between the last <answer> and </answer>; None where there is nothing."""
    end = part.rfind("</answer>")
    start = part.rfind("<answer>", 0, end) if end >= 0 else -1
    return (part[start + 8 : end].strip() or None) if start >= 0 else None


def string_gold(question: Question) -> str:
    """Read the gold answer as text. Raises UnusableQuestion where it is missing or blank."""
    answer = question.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = repr(answer)
    if answer is None:
        raise UnusableQuestion("'answer' is missing; the verifier needs the gold answer")
    if not isinstance(answer, str):
        raise UnusableQuestion("'answer' must be a string")
    answer = answer.rpartition("####")[2].strip()  # GSM8K keeps its solution in the field too
    if not answer:
        raise UnusableQuestion("'answer' is blank; the verifier needs the gold answer")
    return answer
