r"""Forms of extracted answers, by which votes tell most of them together or apart without asking math-verify.

*Own form*: one spelling for what is plainly the same (`0.50`, `\frac{1}{2}`, `1/2`), and the number it is, if it is
one. *Published form*: the expression that the paper's evaluation votes by; two answers are one vote if and only if
their expressions are of the same structure, so 025 joins 25 and \dfrac12 joins 1/2, but 2\sqrt2 not \sqrt8.
*Signature*: the values of an expression, or of the entries of a list, with fixed numbers for its letters. A value that
is far from all values of another answer makes the two different.
"""

from __future__ import annotations

import cmath
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", re.ASCII)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)(?:\\frac\{(?P<over>[+-]?[0-9]{1,40})\}\{(?P<under>[0-9]{1,40})\}"
    r"|(?P<above>[0-9]{1,40})/(?P<below>[0-9]{1,40}))",
    re.ASCII,
)
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])(?![0-9])", re.ASCII)
_UNIT = re.compile(
    r"(?P<number>.*[0-9}]) ?(?P<unit>\^\{?\\circ\}?|\\?%|\\(?:text|mathrm)\{[^{}]*\})", re.ASCII | re.DOTALL
)
_LIST = re.compile(r"(?P<open>\(|\[|\\\{)?(?P<entries>[^;]*?)(?P<close>\)|\]|\\\})?", re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Za-z] ?= ?")
_UNSEEN = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_ARITHMETIC = re.compile(
    r"(?:[0-9A-Za-z.+\-*/^(){} ]|\\(?:frac|sqrt|pi|cdot|times|left|right|sin|cos|tan|log|ln)(?![A-Za-z]))+", re.ASCII
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_DOUBTFUL = re.compile(r".*[0-9]\s+[0-9].*|[+-]?[0-9.]+\s*[A-Za-z]+|.*\^ ?\{?[^{}]*(?:[0-9]{4}|\^).*", re.ASCII)
"""A mixed number; a number with a letter, which may be a unit; an exponent of thousands, or with one of its own."""
CLOSE = 1e-5
"""math-verify rounds decimals to six places; values farther apart are different to it as well."""


@dataclass(frozen=True)
class OwnForm:
    """One spelling of an answer."""

    text: str
    """Answers of the same text are the same."""
    value: Fraction | None
    """Of a whole number, a decimal or a fraction of whole numbers, with or without a unit."""
    unit: str = ""
    """Percent, degrees or words behind the number; values of other units are not compared."""


def own_form(answer: str) -> OwnForm:
    """The own form of an answer as it was extracted."""
    text = _UNSEEN.sub("", answer.strip().strip("$").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _LOOSE_SPACE.sub("", text).replace("{,}", ",").replace("−", "-"))
    match = _UNIT.fullmatch(text)
    number, unit = (match["number"], match["unit"]) if match else (text, "")
    value = _number(number)
    if value is None:
        return OwnForm(text, None)
    decimal = number.replace(",", "").lstrip("+").rstrip("0") if "." in number else ""
    return OwnForm(f"{value}{unit}" if value.denominator == 1 or not decimal else f"{decimal}{unit}", value, unit)


def _number(text: str) -> Fraction | None:
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        under = int(match["under"] or match["below"])
        over = int(match["over"] or match["above"])
        return Fraction(-over if match["sign"] == "-" else over, under) if under else None
    return None


def entries(answer: str) -> list[str] | None:
    """The entries of a list, or the answer alone; None where their values may not be all that the answer says.

    They are written in numbers, single letters and operations alone; of `x=3` the entry is 3.
    """
    if assigned := _ASSIGNMENT.match(answer):
        answer = answer[assigned.end() :]
    parts = [answer]
    if "," in answer:
        match = _LIST.fullmatch(answer)
        if match is None or (match["open"] is None) != (match["close"] is None):
            return None
        parts = [part.strip() for part in match["entries"].split(",")]
    plain = all(_ARITHMETIC.fullmatch(p) and not _WORD.search(p) and not _DOUBTFUL.fullmatch(p) for p in parts)
    has_letter = assigned and re.search(r"(?<![\\A-Za-z])[A-Za-z]", answer)
    return parts if plain and not has_letter else None


def whole_number_form(answer: str) -> str | None:
    """The published form of a whole number; None for any other answer, which the library must read."""
    return f"Integer({int(answer)})" if WHOLE_NUMBER.fullmatch(answer) else None


def published_form(answer: str) -> str | None:
    """The published form: the structure of the expression; None for an answer that is no mathematics to the library."""
    parsed = _published_expression(answer)
    return _structure(parsed[0]) if parsed else None


def published_verdict(gold: str, answer: str) -> bool:
    """The published judge's verdict on two answers of different forms, neither of them a decimal.

    It takes the answer for the reference and the reference for the answer.
    """
    from math_verify import verify

    return bool(verify(_published_expression(answer), _published_expression(gold), timeout_seconds=None))


def is_settled(gold: str | None, answer: str | None) -> bool:
    """Whether two published forms are enough for the published verdict, which is then whether they are equal.

    A decimal is wrong against any other form: the judge is given the question in the place of the number of digits.
    """
    if gold is None or answer is None or gold == answer:
        return True
    numbers = all(form.startswith("Integer(") for form in (gold, answer))
    return numbers or any(form.startswith("Float(") for form in (gold, answer))


def _published_expression(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    config = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(rf"\boxed{{{answer}}}", config, fallback_mode="no_fallback", parsing_timeout=None)


def _structure(expression: Any) -> str:
    """An expression as text, equal for equal expressions alone: unlike sympy's own it keeps the order of the parts."""
    import sympy

    parts = getattr(expression, "args", ())
    if not parts:
        return sympy.srepr(expression)
    return f"{type(expression).__name__}({', '.join(map(_structure, parts))})"


def signature(answer: str) -> list[complex] | None:
    """The values of an answer's `entries`; None where one has none or is too large."""
    values = [_value(part) for part in entries(answer) or [""]]
    return None if None in values else [value for value in values if value is not None]


def _value(part: str) -> complex | None:
    import sympy
    from math_verify import LatexExtractionConfig, parse

    config = (LatexExtractionConfig(boxed_match_priority=0),)
    parsed = parse(rf"\boxed{{{part}}}", config, fallback_mode="no_fallback", parsing_timeout=None) if part else []
    expression = parsed[0] if parsed else None
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.UnevaluatedExpr):
        return None
    try:
        value = complex(expression.xreplace({s: _letters_value(s.name) for s in expression.free_symbols}).evalf(15))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return value if cmath.isfinite(value) else None


def _letters_value(name: str) -> object:
    """A fixed number for a symbol: the product of its letters' numbers, as `ab` may be a name or a product."""
    import sympy

    product: object = sympy.Integer(1)
    for letter in name.lower():
        constants: dict[str, object] = {"e": sympy.E, "i": sympy.I}
        digest = int.from_bytes(hashlib.blake2b(letter.encode(), digest_size=4).digest(), "big")
        product = product * constants.get(letter, sympy.Rational(digest, 2**31) + 1)  # type: ignore[operator]
    return product


def are_apart(a: Sequence[complex | Fraction], b: Sequence[complex | Fraction]) -> bool:
    """Whether a value of one answer is so far from all of the other that the answers cannot mean the same."""
    return any(all(_are_far(x, y) for y in b) for x in a) or any(all(_are_far(x, y) for x in a) for y in b)


def _are_far(a: complex | Fraction, b: complex | Fraction) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b) > CLOSE
    try:
        a, b = complex(a), complex(b)
    except OverflowError:
        return False
    return abs(a - b) > CLOSE + 1e-9 * max(abs(a), abs(b))
