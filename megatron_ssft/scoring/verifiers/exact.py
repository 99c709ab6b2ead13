r"""String equality of the final answer with the gold answer.

Without `answer_after` the answer is what follows the last `#` (so `####` too) up to the end of its line, or the content
of the last \boxed{...}, whichever stands later. Both sides are normalised: spaces, commas between thousands, dollar
signs and a full stop at the end do not count.
"""

from __future__ import annotations

import re

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

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
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
    return wrong_or_correct(answer == normalise(string_gold(question)), answer)


def extract(text: str, answer_after: str | None) -> str | None:
    """Find the final answer, normalised; None if there is none."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    place, boxes = last_boxes(part)
    hash_place = part.rfind("#")
    if place > hash_place:
        answer = boxes[-1]
    elif hash_place >= 0:
        answer = part[hash_place + 1 :].lstrip().partition("\n")[0]
    elif answer_after is not None:
        answer = part
    else:
        return None
    if len(answer) > MAX_ANSWER:
        return None
    return normalise(answer) or None


def normalise(answer: str) -> str:
    """Remove what does not count."""
    answer = " ".join(answer.split()).rstrip(".").strip()
    answer = answer.removeprefix("\\$").strip("$").strip()
    return _THOUSANDS.sub(lambda number: number[0].replace(",", ""), answer)
