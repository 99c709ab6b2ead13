r"""String equality of the final answer with the gold answer; numbers are equal by value.

Without `answer_after` the answer is what follows the last `#` (so `####` too) up to the end of its line, or the content
of the last \boxed{...}, whichever stands later; a heading of Markdown above more text is no answer. Else it is what
stands between <answer> and </answer>. Both sides are normalised: spaces, bold, a font around everything, separators
between thousands, dollar signs and a full stop at the end do not count. Of two plain numbers (-12, 1,234.50, 1.5e3) the
values are compared. Percent signs and units count: whether they are right to leave out, a comparison of texts cannot
know.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_ssft.boxed import last_boxes
from megatron_ssft.scoring.verifiers.common import (
    NO_ANSWER,
    Judgement,
    Question,
    Settings,
    UnusableQuestion,
    answer_part,
    string_gold,
    tagged_answer,
    wrong_or_correct,
)

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SET_APART = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!|[\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))")
_FONT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|boldsymbol|mbox)\s*\{([^{}]*)\}")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)
_HEADING = re.compile(r"#{1,6}[ \t]")
MAX_ANSWER = 10_000
"""Characters; what is longer is no final answer."""


def check_question(question: Question) -> None:
    """Raises UnusableQuestion."""
    if not normalise(string_gold(question)):
        raise UnusableQuestion(f"'answer' {question['answer']!r} has nothing left to compare")


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Compare the final answer of `text` with the gold answer."""
    answer = extract(text, settings.answer_after)
    if answer is None:
        return NO_ANSWER
    return wrong_or_correct(_equal(normalise(string_gold(question)), answer), answer)


def extract(text: str, answer_after: str | None) -> str | None:
    """Find the final answer, normalised; None if there is none."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    tagged = tagged_answer(part) if answer_after is None else None
    part = part if tagged is None else tagged
    place, boxes = last_boxes(part)
    hash_place = _last_hash(part, place)
    if place > hash_place:
        answer = ", ".join(boxes)
    elif hash_place >= 0:
        answer = part[hash_place + 1 :].lstrip().partition("\n")[0]
    elif answer_after is not None or tagged is not None:
        answer = part
    else:
        return None
    if len(answer) > MAX_ANSWER:
        return None
    return normalise(answer) or None


def normalise(answer: str) -> str:
    """Remove what does not count."""
    answer = " ".join(_SET_APART.sub("", answer).split()).rstrip(".").strip()
    answer = _BOLD.sub(r"\1", answer).removeprefix("**").removesuffix("**")
    while font := _FONT.fullmatch(answer):
        answer = font[1].strip()
    answer = answer.rstrip(".").strip().removeprefix("\\$").strip("$").strip().replace("−", "-")
    return _THOUSANDS.sub(lambda number: number[0].replace(",", ""), answer)


def _equal(gold: str, answer: str) -> bool:
    """Whether the texts are the same, or numbers of the same value."""
    if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer):
        return Fraction(gold) == Fraction(answer)
    return gold == answer


def _last_hash(part: str, place_of_box: int) -> int:
    """Place of the last `#` with an answer behind it; -1 if there is none.

    Below a box, and below a `####` line, a heading with more text under it is passed over.
    """
    first_marker, end_of_text = part.find("####"), len(part.rstrip())
    end = len(part)
    while (place := part.rfind("#", 0, end)) >= 0:
        start = part.rfind("\n", 0, place) + 1
        end_of_line = part.find("\n", place)
        has_text_below = 0 <= end_of_line < end_of_text
        is_second = 0 <= place_of_box < place or 0 <= first_marker < start
        if not (has_text_below and is_second and _HEADING.match(part, start)):
            return place
        end = start
    return -1
