r"""Mathematical equality by math-verify, with what it gets wrong on final answers put right around it.

math_extraction.py finds the answer in the text, math_notation.py and math_units.py bring it into a form that
math-verify reads as a mathematician would, math_expressions.py has it compared. Here stands what is decided before
that: plain numbers are compared exactly, words by their letters, lists with an ellipsis by what is written, and numbers
too large to write down by their form alone, so that 10^{10^{10}} costs nothing.

math-verify guards itself with an alarm signal, which is switched off here: its exception passes through handlers that
expect ordinary ones, and an alarm does not interrupt a long multiplication. The process around it is killed instead.
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
    string_gold,
    wrong_or_correct,
)
from megatron_ssft.scoring.verifiers.math_expressions import parsed, same, split_at_top
from megatron_ssft.scoring.verifiers.math_extraction import extract
from megatron_ssft.scoring.verifiers.math_notation import normalise
from megatron_ssft.scoring.verifiers.math_units import split_unit, units_differ

__all__ = ["check_question", "equal", "extract", "is_readable", "judge", "normalise"]

_PLAIN_NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"-?(?:0,\d{2,}|\d+,\d{2}|\d+,\d{4,})")
_CUT_OFF = re.compile(r"\A(-?\d+\.\d+)\s*(?:\\[lc]?dots|\.\.\.)\s*\Z")
"""A decimal with dots behind its last digit."""
_ELLIPSIS = re.compile(r",?\s*(?:\\(?:[lc]|dotsc|dotsb)?dots[cbmi]?(?![A-Za-z])|\.\.\.)\s*,?")
_CUT_SUM = re.compile(r"[-+*/=]\s*$|^\s*[+*/=]|\\(?:cdot|times)\s*$|^\s*\\(?:cdot|times)")
"""Part of a sum or product, no expression of its own."""
_IN_BASE = re.compile(r"\(?(\w+)\)?_\{?(?:\\text\{)?(\d{1,2}|\w+)\}{0,2}")
_IN_TEXT = re.compile(r"\\text\s*\{\s*([A-Za-z][A-Za-z ,'’-]*?)\s*\}")
_WORD = re.compile(r"[A-Za-z]{5,}(?: [A-Za-z]+)*")
_SHORT_WORDS = frozenset(("true", "yes", "no", "even", "odd", "none", "both", "only"))


def check_question(question: Question) -> None:
    """Raises UnusableQuestion unless the gold answer can be read."""
    gold = _gold(question)
    if not is_readable(gold):
        raise UnusableQuestion(f"'answer' {gold[:80]!r} cannot be read as mathematics; write it in LaTeX")


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Compare the final answer of `text` with the gold answer."""
    answer = extract(text, settings.answer_after)
    if answer is None:
        return NO_ANSWER
    return wrong_or_correct(equal(_gold(question), answer), answer)


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` is a right way to give `gold`. Not symmetric: `x=3` answers 3, but x>3 has to be said so."""
    gold, answer = normalise(_unboxed(gold)), normalise(_unboxed(answer))
    if gold == answer:
        return bool(gold)
    gold_quantity, answer_quantity = split_unit(gold), split_unit(answer)
    if units_differ(gold_quantity, answer_quantity):
        return False
    gold, answer = (_CUT_OFF.sub(r"\1", normalise(side.value)) for side in (gold_quantity, answer_quantity))
    if gold == answer:
        return bool(gold)
    for verdict in (_equal_numbers(gold, answer), _equal_words(gold, answer), _equal_lists(gold, answer)):
        if verdict is not None:
            return verdict
    if (gold_base := _IN_BASE.fullmatch(gold)) and (answer_base := _IN_BASE.fullmatch(answer)):
        return gold_base.groups() == answer_base.groups()
    return same(parsed(gold), parsed(answer))


def is_readable(gold: str) -> bool:
    """Whether an answer can be equal to `gold` other than by being the same text."""
    gold = normalise(split_unit(normalise(_unboxed(gold))).value)
    if _plain_number(gold) is not None or _word(gold) is not None or _ellipsis_parts(gold) is not None:
        return True
    return any(not isinstance(item, str) for item in parsed(gold))


def _gold(question: Question) -> str:
    """The gold answer; of a whole solution, what it boxes."""
    return _unboxed(string_gold(question))


def _unboxed(answer: str) -> str:
    _, boxes = last_boxes(answer)
    return ", ".join(box.strip() for box in boxes) if boxes else answer


def _equal_numbers(gold: str, answer: str) -> bool | None:
    """Compare plain numbers and percentages; None where one of the two is something else."""
    numbers = _plain_number(gold), _plain_number(answer)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    percentages = _percentage(gold), _percentage(answer)
    for (number, percentage), whole in zip(zip(numbers, reversed(percentages)), (gold, answer)):
        if number is not None and percentage is not None:
            return percentage == number or ("." in whole and percentage == 100 * number)
    if percentages[0] is not None and percentages[1] is not None:
        return percentages[0] == percentages[1]
    for comma, point in ((gold, answer), (answer, gold)):
        if _DECIMAL_COMMA.fullmatch(comma) and "." in point and (value := _plain_number(point)) is not None:
            return value == Fraction(comma.replace(",", "."))
    return None


def _plain_number(answer: str) -> Fraction | None:
    """Read digits with at most a sign, a point and commas between thousands."""
    answer = answer.replace("$", "").replace("\\", "").strip().removeprefix("+")
    if _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "")
    return Fraction(answer) if _PLAIN_NUMBER.fullmatch(answer) else None


def _percentage(answer: str) -> Fraction | None:
    """Read a plain number of percent."""
    return _plain_number(answer.removesuffix("\\%")) if answer.endswith("\\%") else None


def _equal_words(gold: str, answer: str) -> bool | None:
    """Compare words without regard to case; None where one of the two is none, such as a product of letters."""
    words = _word(gold), _word(answer)
    if None in words and _IN_TEXT.fullmatch(gold) and re.fullmatch(r"[A-Za-z][A-Za-z ]+", answer):
        words = words[0], answer
    return None if words[0] is None or words[1] is None else words[0].casefold() == words[1].casefold()


def _word(answer: str) -> str | None:
    if in_text := _IN_TEXT.fullmatch(answer):
        return in_text[1]
    return answer if _WORD.fullmatch(answer) or answer.casefold() in _SHORT_WORDS else None


def _equal_lists(gold: str, answer: str) -> bool | None:
    """Compare what is written before, between and after ellipses; None where there is none."""
    gold_parts, answer_parts = _ellipsis_parts(gold), _ellipsis_parts(answer)
    if gold_parts is None and answer_parts is None:
        return None
    if gold_parts is None or answer_parts is None or len(gold_parts) != len(answer_parts):
        return False
    progressions = _progression(gold_parts), _progression(answer_parts)
    if progressions[0] is not None and progressions[1] is not None:
        return progressions[0] == progressions[1]
    return all(
        len(gold_elements) == len(answer_elements) and all(map(_equal_elements, gold_elements, answer_elements))
        for gold_elements, answer_elements in zip(gold_parts, answer_parts)
    )


def _ellipsis_parts(answer: str) -> list[list[str]] | None:
    """Elements of a list between its ellipses; None where there is no ellipsis."""
    inner = re.sub(r"^\s*(?:\\left)?\\\{|(?:\\right)?\\\}\s*$", "", answer)
    parts = _ELLIPSIS.split(inner)
    if len(parts) == 1:
        return None
    return [[element.strip() for element in split_at_top(part)] if part.strip() else [] for part in parts]


def _progression(parts: list[list[str]]) -> tuple[object, ...] | None:
    """First element, step and last one of an arithmetic progression with one ellipsis; None for anything else."""
    numbers = [[number for element in part if (number := _plain_number(element)) is not None] for part in parts]
    if len(numbers) != 2 or len(numbers[0]) < 2 or list(map(len, numbers)) != list(map(len, parts)):
        return None
    first, last = numbers
    steps = {after - before for before, after in zip(first, first[1:])} | {b - a for a, b in zip(last, last[1:])}
    return (first[0], *steps, last[-1] if last else None) if len(steps) == 1 else None


def _equal_elements(gold: str, answer: str) -> bool:
    if any(_CUT_SUM.search(side) for side in (gold, answer)):
        return re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer)
    return equal(gold, answer)
