r"""Multiple choice: the letter that a text settles on, as for GPQA.

Looked for in this order, the last place of the first kind that is there at all: \boxed{C}; `answer: C`, `the answer is
(C)`; `option C`, `(C)` or a line that is just `C` in the last line with text. A box may hold the text of a choice
instead. Where a place names two letters, or `A` may be the article, it names none.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from megatron_ssft.boxed import last_boxes
from megatron_ssft.scoring.verifiers.common import (
    NO_ANSWER,
    Judgement,
    Question,
    Settings,
    UnusableQuestion,
    answer_part,
    string_gold,
    wrong_or_correct,
)

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm|boxed|fbox)\s*(?=\{)|\\[,;! ]|\\[()\[\]]|[*_`${}]"
)
_ANSWER = re.compile(
    r"\b(?:answer|choice|option)(?:\s+(?:choice|option|letter))?(?:\s+(?:is|would\s+be|must\s+be|should\s+be))?\s*[:=]?\s*",
    re.IGNORECASE,
)
_LETTER = re.compile(r"(?P<open>[(\[]?)\s*(?P<letter>[A-Za-z])\s*(?P<close>[)\]]?)(?![\w'’])")
_SECOND = re.compile(r"\s*(?:,|/|&|and|or)\s*(?:option\s+|choice\s+)?[(\[]?\s*[A-Z]\s*(?:[)\]]|(?![\w'’]))(?!\s+[a-z])")
_ARTICLE_FOLLOWS = re.compile(r"[ \t]+(?!(?:because|since|as|for|which|is|due|given|by|with|here|but|so)\b)[a-z]")
_BRACKETED = re.compile(r"\(\s*([A-Z])\s*\)")
_IS_CORRECT = re.compile(
    r"\b([A-Z])(?=\s+is\s+(?:the\s+)?(?:(?!not\b|never\b|in)\w+\s+)?(?:correct|right|best|answer)\b)"
)
_TAIL = 4000
"""Characters in front of the end in which words are looked at."""


def check_question(question: Question) -> None:
    """Raises UnusableQuestion unless the gold answer is the letter of a choice."""
    letter = _gold(question)
    letters = _letters(question)
    if letter not in letters:
        raise UnusableQuestion(f"'answer' {question['answer']!r} is none of the letters {letters[0]}-{letters[-1]}")


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Compare the letter that `text` settles on with the gold letter."""
    choices = question.get("choices")
    texts = [str(choice) for choice in choices] if isinstance(choices, list) else []
    letter = extract(text, _letters(question), settings.answer_after, texts)
    return NO_ANSWER if letter is None else wrong_or_correct(letter == _gold(question), letter)


def _gold(question: Question) -> str:
    return _plain(string_gold(question)).strip("().[] ").upper()


def _letters(question: Question) -> str:
    choices = question.get("choices")
    if choices is None:
        return "ABCD"
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise UnusableQuestion("'choices' must be a list of 2 to 26 texts")
    return string.ascii_uppercase[: len(choices)]


def extract(
    text: str, letters: str = "ABCD", answer_after: str | None = None, choices: Sequence[str] = ()
) -> str | None:
    """Find the letter, one of `letters`; None if there is none or no single one."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    place, boxes = last_boxes(part)
    if place >= 0:
        named = {_boxed(content[:_TAIL], letters, choices) for content in boxes}
        if named != {None}:
            return named.pop() if len(named) == 1 else None
    part = _plain(part[-_TAIL:])
    places = [(lead, match) for lead in _ANSWER.finditer(part) if (match := _LETTER.match(part, lead.end()))]
    for lead, match in reversed(places):
        letter, is_letter = _read_letter(match, letters, strict=lead[0].rstrip()[-1:] not in (":", "="))
        if is_letter:
            return letter
    return _from_last_line(part, letters)


def _boxed(content: str, letters: str, choices: Sequence[str]) -> str | None:
    """Find the letter that a box names, alone or in front of its text."""
    plain = _plain(content).strip()
    plain = _ANSWER.sub("", plain, count=1) if _ANSWER.match(plain) else plain
    match = re.fullmatch(r"\(?\s*([A-Za-z])\s*(?:[).:,].*)?", plain, re.DOTALL)
    if match and match[1].upper() in letters and not _SECOND.match(plain, match.end(1)):
        return match[1].upper()
    same = [letter for letter, choice in zip(letters, choices) if _words(choice) == _words(content)]
    return same[0] if len(same) == 1 else None


def _read_letter(match: re.Match[str], letters: str, strict: bool) -> tuple[str | None, bool]:
    """Return (letter or None for two of them, whether there is a letter of a choice at all).

    `match`: of _LETTER. `strict`: there is no colon in front, so a small letter or an `A` before a word is none.
    """
    letter = match["letter"].upper()
    bracketed = bool(match["open"] and match["close"])
    if letter not in letters:
        return None, False
    rest = match.string[match.end() : match.end() + 200]
    if not bracketed:
        if letter in "AI" and _ARTICLE_FOLLOWS.match(rest):
            return None, False
        if match["letter"].islower() and (strict or not re.match(r"\s*(?:[.)\]:,]|$)", rest)) and not match["close"]:
            return None, False
    return (None, True) if _SECOND.match(rest) else (letter, True)


def _from_last_line(text: str, letters: str) -> str | None:
    line = text.rstrip().rpartition("\n")[2].strip()
    alone = re.fullmatch(r"[(\[]?\s*([A-Za-z])\s*[)\].:]*", line)
    if alone:
        return alone[1].upper() if alone[1].upper() in letters else None
    leading = re.match(r"\(?([A-Z])[).:]\s", line)
    named = {*_BRACKETED.findall(line), *_IS_CORRECT.findall(line)} | ({leading[1]} if leading else set())
    named &= set(letters)
    return named.pop() if len(named) == 1 else None


def _plain(text: str) -> str:
    """Remove the markup that stands around letters."""
    return _WRAPPER.sub("", text)


def _words(text: str) -> str:
    return " ".join(_plain(text).split()).strip(" .").casefold()
