"""Shared by all verifiers: their contract, result and settings, and where in a text the answer is looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_ssft.scoring.sandbox.inside.specification import Mechanism

Question = Mapping[str, object]
"""A row of the questions file."""

_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,9}\{)|\\boxed\s{1,9}(?P<digit>[0-9])|\\.|[{}]", re.DOTALL)
_CONNECTOR = re.compile(r"[\s$.,;:&]*(?:and|or)?[\s$.,;:&]*(?:[A-Za-z]\s*=)?[\s$]*")


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

    That is after `answer_after`, else after the last closing think tag, or before it if nothing follows.
    """
    if answer_after:
        _, separator, rest = text.rpartition(answer_after)
        return rest if separator else None
    if answer_after is None:
        start = text.rfind("</think")
        end = text.find(">", start, start + 40) if start >= 0 else -1
        if end >= 0:
            return text[end + 1 :] if text[end + 1 :].strip() else text[:start]
    return text


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


def last_boxes(text: str) -> tuple[int, list[str]]:
    r"""Find the contents of the last \boxed{...} and of those right before it.

    Those are joined to it by nothing but `and`, commas or spaces. Returns the place where the last one begins (-1 if
    there is none) and the contents in their order. Boxes that are never closed do not count, nor do those within
    others. Linear in the length of the text.
    """
    spans: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        if token["box"]:
            open_braces.append((token.start(), token.end()))
        elif token["digit"]:
            spans.append((token.start(), token.end(), token["digit"]))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces and (box := open_braces.pop()) is not None:
            while spans and spans[-1][0] > box[0]:
                spans.pop()
            spans.append((box[0], token.end(), text[box[1] : token.start()]))
    if not spans:
        return -1, []
    first = len(spans) - 1
    while first > 0 and _is_connector(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    return spans[-1][0], [inner for _, _, inner in spans[first:]]


def _is_connector(between: str) -> bool:
    return len(between) < 40 and _CONNECTOR.fullmatch(between) is not None
