r"""Mathematical equality by math-verify, with what it gets wrong on final answers put right around it.

The answer is the content of the last \boxed{...} (of several boxes joined by `and` or commas, all), else what follows
the last `####`, else the last line if it is `Answer: ...`, else what math-verify finds near the end of the text. It is
brought into a form that math-verify reads as a mathematician would (1e3, thousands separators, mixed numbers, degrees,
units in words, bases). Plain numbers are compared exactly, and numbers too large to write down by their form alone, so
that 10^{10^{10}} costs nothing.

math-verify guards itself with an alarm signal, which is switched off here: its exception passes through handlers that
expect ordinary ones, and an alarm does not interrupt a long multiplication. The process around it is killed instead.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # takes a second, and the other verifiers have no need of it
    import sympy

MAX_ANSWER = 4000
"""Characters; what is longer is no final answer."""
_TAIL = 1500
"""Characters in front of the end in which math-verify looks for an answer that is not boxed."""
_HUGE_EXPONENT = 20_000

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_PLAIN_NUMBER = re.compile(_NUMBER)
_SCIENTIFIC = re.compile(rf"({_NUMBER})[eE]([+-]?\d{{1,4}})")
_MIXED = re.compile(r"(-?)(\d{1,9})\s+(\d{1,9})\s*/\s*(\d{1,9})")
_SEPARATED = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:\\[,;: ]|\{,\}|~|(?<=\d) (?=\d{3}\b))\d{3})+)(?!\d)")
_IN_BASE = re.compile(r"\(?(\w+)\)?_\{?(?:\\text\{)?(\d{1,2}|\w+)\}{0,2}")
_UNIT = r"(?!and\b|or\b|to\b|mod\b|pi\b|sqrt\b)[A-Za-z]{3,20}(?:[ -][A-Za-z]{2,20}){0,3}"
_IN_WORDS = re.compile(rf"((?:\\?\$)?\s*{_NUMBER})\s+({_UNIT})")
_LAST_LINE = re.compile(r"[*_]*(?:final answer|answer|a)[*_]*\s?[:=][*_]*(.+?)[*_]*", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{5,}(?: [A-Za-z]+)*")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_REPLACED = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\varnothing", "\\emptyset"),
    ("\\text{-}", "-"),
    ("\\textminus", "-"),
    ("−", "-"),
    ("–", "-"),
    ("°", "^\\circ"),
    ("×", "\\times "),
    ("·", "\\cdot "),
    ("π", "\\pi "),
    ("∞", "\\infty "),
    ("√", "\\sqrt "),
    ("≤", "\\le "),
    ("≥", "\\ge "),
    ("∪", "\\cup "),
    ("∅", "\\emptyset "),
    ("½", "\\frac{1}{2}"),
    ("\u00a0", " "),
)


def check_question(question: Question) -> None:
    """Raises UnusableQuestion unless the gold answer can be read."""
    gold = string_gold(question)
    if not is_readable(gold):
        raise UnusableQuestion(f"'answer' {gold[:80]!r} cannot be read as mathematics; write it in LaTeX")


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Compare the final answer of `text` with the gold answer."""
    answer = extract(text, settings.answer_after)
    if answer is None:
        return NO_ANSWER
    return wrong_or_correct(equal(string_gold(question), answer), answer)


def extract(text: str, answer_after: str | None = None) -> str | None:
    """Find the final answer as it stands in the text; None if there is none."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    _, boxes = last_boxes(part)
    if boxes:
        answer = ", ".join(box.strip() for box in boxes)
    elif (marker := part.rfind("####")) >= 0:
        answer = part[marker + 4 :].strip().partition("\n")[0]
    elif last_line := _LAST_LINE.fullmatch(part[-_TAIL:].strip().rpartition("\n")[2]):
        answer = last_line[1]
    elif answer_after is not None and len(part) <= _TAIL and "\n" not in part.strip():
        answer = part
    else:
        parsed = _library().parse(part[-_TAIL:], parsing_timeout=None)
        answer = next((item for item in parsed if isinstance(item, str)), "")
    answer = answer.strip()
    return answer if answer and len(answer) <= MAX_ANSWER else None


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` is a right way to give `gold`. Not symmetric: `x=3` answers 3, but x>3 has to be said so."""
    gold, answer = normalise(gold), normalise(answer)
    if gold == answer:
        return bool(gold)
    numbers = _plain_number(gold), _plain_number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _WORD.fullmatch(gold) and _WORD.fullmatch(answer):  # else products of letters, which may be swapped
        return gold.casefold() == answer.casefold()
    if (gold_base := _IN_BASE.fullmatch(gold)) and (answer_base := _IN_BASE.fullmatch(answer)):
        return gold_base.groups() == answer_base.groups()
    gold_parsed, answer_parsed = _parsed(gold), _parsed(answer)
    if any(map(_is_huge, (*gold_parsed, *answer_parsed))):
        return any(g == a for g in gold_parsed for a in answer_parsed)
    return _library().verify(list(gold_parsed), list(answer_parsed), allow_set_relation_comp=True, timeout_seconds=None)


def is_readable(gold: str) -> bool:
    """Whether an answer can be equal to `gold` other than by being the same text."""
    gold = normalise(gold)
    return _plain_number(gold) is not None or any(not isinstance(item, str) for item in _parsed(gold))


def normalise(answer: str) -> str:
    """Put the answer into words that math-verify understands; empty if nothing is left."""
    answer = answer.strip()
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    answer = re.sub(r"(?<!\\)[.;,]\s*$", "", answer).strip()
    answer = _SEPARATED.sub(lambda number: number[1] + re.sub(r"\D", "", number[2]), answer)
    if _TRIGONOMETRIC.search(answer):
        answer = _DEGREES.sub(r"{(\\frac{\1\\pi}{180})}", answer)
    if mixed := _MIXED.fullmatch(answer):
        return rf"{mixed[1]}({mixed[2]}+\frac{{{mixed[3]}}}{{{mixed[4]}}})"
    if scientific := _SCIENTIFIC.fullmatch(answer):
        return rf"{scientific[1]}\cdot 10^{{{int(scientific[2])}}}"
    if worded := _IN_WORDS.fullmatch(answer):
        return worded[1] + ("\\%" if worded[2].lower() in ("percent", "per cent") else "")
    return answer


def _plain_number(answer: str) -> Fraction | None:
    """Read digits with at most a sign, a point and commas between thousands."""
    answer = answer.replace("$", "").replace("\\!", "").replace("\\", "").strip().removeprefix("+")
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer):
        answer = answer.replace(",", "")
    return Fraction(answer) if _PLAIN_NUMBER.fullmatch(answer) else None


@functools.lru_cache(maxsize=64)
def _parsed(answer: str) -> tuple[object, ...]:
    """Let math-verify read a final answer: an expression, then the text itself."""
    library = _library()
    config = (library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig())
    return tuple(map(_with_imaginary_unit, library.parse(rf"\boxed{{{answer}}}", config, parsing_timeout=None)))


def _with_imaginary_unit(expression: object) -> object:
    """Replace `i`, a symbol like any other to math-verify, by the number."""
    import sympy

    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)) or _is_huge(expression):
        return expression
    units = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return expression.xreplace(units) if units else expression


def _is_huge(expression: object) -> bool:
    """Whether evaluating it would fill the memory: powers and factorials of enormous numbers."""
    import sympy

    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)):
        return False
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, sympy.Pow) and _size(node.exp) > _HUGE_EXPONENT and _size(node.base) != 1:
            return True
        if isinstance(node, (sympy.factorial, sympy.binomial)) and _size(node.args[0]) > _HUGE_EXPONENT:
            return True
    return False


def _size(expression: sympy.Basic) -> float:
    """Estimate the absolute value, infinity where it does not fit a float; 0 for what is not a number."""
    import sympy

    try:
        if isinstance(expression, sympy.Number):
            return abs(float(expression))
        sizes = [_size(part) for part in expression.args]
        if isinstance(expression, sympy.Pow):
            return sizes[0] ** sizes[1]
        if isinstance(expression, sympy.factorial):
            return math.gamma(sizes[0] + 1)
        if isinstance(expression, sympy.Mul):
            return math.prod(sizes)
        return sum(sizes)
    except (OverflowError, ZeroDivisionError, ValueError):
        return math.inf


@functools.cache
def _library() -> ModuleType:
    """Import math_verify when it is needed: it takes a second."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarm is off
    return math_verify
