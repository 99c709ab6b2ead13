r"""One notation for a final answer: what people and models write, as math-verify reads it.

Markup is removed (bold, `\(`, \boldsymbol), Unicode is put into LaTeX (the minus sign, superscripts, thin spaces),
upright e and i are the numbers that they mean, and numbers lose their separators.
"""

from __future__ import annotations

import re

_REPLACED = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\varnothing", "\\emptyset"),
    ("\\text{-}", "-"),
    ("\\textminus", "-"),
    ("\\lor", "\\text{ or }"),
    ("\\vee", "\\text{ or }"),
    ("−", "-"),
    ("–", "-"),
    ("‑", "-"),
    ("°", "^\\circ"),
    ("×", "\\times "),
    ("÷", "\\div "),
    ("·", "\\cdot "),
    ("⋅", "\\cdot "),
    ("π", "\\pi "),
    ("∞", "\\infty "),
    ("√", "\\sqrt "),
    ("≤", "\\le "),
    ("≥", "\\ge "),
    ("⩽", "\\le "),
    ("⩾", "\\ge "),
    ("≠", "\\ne "),
    ("±", "\\pm "),
    ("∪", "\\cup "),
    ("∩", "\\cap "),
    ("∈", "\\in "),
    ("∅", "\\emptyset "),
    ("½", "\\frac{1}{2}"),
    ("⅓", "\\frac{1}{3}"),
    ("⅔", "\\frac{2}{3}"),
    ("¼", "\\frac{1}{4}"),
    ("¾", "\\frac{3}{4}"),
    ("…", "\\ldots "),
    ("\\euro", "€"),
    ("\\pounds", "£"),
)
_SPACES = str.maketrans(dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2007\u2008\u2009\u200a\u202f\u205f", " "))
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")

_BOLD = re.compile(r"(?<![\w)}*])\*\*(?=\S)([^*]+)(?<=\S)\*\*")
_QUOTED = re.compile(r"\A(?:\\?[\"“”`])+|(?:\\?[\"“”`])+\Z")
_DOLLAR = re.compile(r"(?<!\\)\$")
_WIDE_SPACE = re.compile(r"\\q?quad(?![A-Za-z])|\\q?quad(?=[A-Za-z]_)|\\[;:>]|\\(?:thin|med|thick|en)space(?![A-Za-z])")
_FONT = re.compile(
    r"\\(?:math(?:rm|bf|it|sf|normal|tt)|text(?:bf|it|rm|sf|normal|tt|up|md|sl)?|boldsymbol|bm|pmb|mbox|emph)\s*"
    r"\{(?P<inner>(?:[^{}]|\{[^{}]*\})*)\}"
)
_OLD_FONT = re.compile(r"\{\s*\\(?:bf|rm|it|sf)\s+([^{}]*)\}|\\(?:bf|rm|it)(?![A-Za-z])\s*")
_STYLE = re.compile(r"\\(?:displaystyle|textstyle|limits|phantom\s*\{\})(?![A-Za-z])")
_OPERATOR = re.compile(r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}")
_FUNCTIONS = re.compile(r"(?:arc|ar)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|lg|exp|min|max|gcd|lcm|det")
_SEPARATED = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:\\[,;: !]|\{,\}|~|,\\!\s?|(?<=\d) (?=\d{3}\b))\d{3})+)(?!\d)")
_BRACKETS = re.compile(r"\(\s*(-?\d+(?:\.\d+)?|[A-Za-z])\s*\)")
_SET_BUILDER = re.compile(
    r"(?:\\left)?\\\{\s*(?P<symbol>[a-z])\s*(?:\\in\s*(?:\\mathbb\{R\}|\\R)\s*)?(?:\\?\||\\mid|:)"
    r"(?P<condition>[^|:\\,{}]*(?:<|>|\\[lg]e)(?:(?!\\in\b|\\mid|[|:,]).)*?)(?:\\right)?\\\}"
)
_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"
_SCIENTIFIC = re.compile(rf"({_NUMBER})[eE]([+-]?\d{{1,4}})")
_MIXED = re.compile(r"(-?)(\d{1,9})\s+(\d{1,9})\s*/\s*(\d{1,9})")
_RECURRING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*\{\s*(\d+)\s*\}")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:per ?cent(?:age)?|pct|\\?%)\s*\}|(?:per ?cent(?:age)?|pct)\b)")


def normalise(answer: str) -> str:
    """Put the answer into words that math-verify understands; empty if nothing is left."""
    answer = without_fonts(_plain(answer))
    answer = _OPERATOR.sub(_function, answer)
    answer = re.sub(r"(?<![\\.])[.;,:]\s*$", "", answer.strip()).strip()
    answer = re.sub(r"\s*(?:\\[,;: ]|~)+$", "", answer)
    answer = _SEPARATED.sub(lambda number: number[1] + re.sub(r"\D", "", number[2]), answer)
    answer = re.sub(r"\\!|\\,", " ", answer)
    answer = re.sub(r"(\d)\.(?=\s*[/*^])", r"\1", answer)
    answer = _PERCENT.sub(r"\\%", answer) if re.search(r"\d", answer) else answer
    answer = _RECURRING.sub(_fraction, answer)
    if _TRIGONOMETRIC.search(answer):
        answer = _DEGREES.sub(r"{(\\frac{\1\\pi}{180})}", answer)
    if solutions := _SET_BUILDER.fullmatch(answer):
        answer = solutions["condition"]
    if bracketed := _BRACKETS.fullmatch(answer):
        answer = bracketed[1]
    if mixed := _MIXED.fullmatch(answer):
        return rf"{mixed[1]}({mixed[2]}+\frac{{{mixed[3]}}}{{{mixed[4]}}})"
    if scientific := _SCIENTIFIC.fullmatch(answer):
        return rf"{scientific[1]}\cdot 10^{{{int(scientific[2])}}}"
    return answer.strip()


def without_bold(text: str) -> str:
    """Remove the Markdown that makes parts of a text bold."""
    return _BOLD.sub(r"\1", text)


def without_fonts(text: str) -> str:
    r"""Take mathematics out of \mathrm, \boldsymbol and the like, and put words into \text."""
    for _ in range(3):  # \textbf{\text{7}}
        text = _FONT.sub(_upright, text)
    return text


def plain_signs(text: str) -> str:
    """Put Unicode signs of a text into ASCII and LaTeX."""
    for before, after in _REPLACED:
        text = text.replace(before, after)
    text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    return _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text).translate(_SPACES)


def _plain(answer: str) -> str:
    """Remove what only sets the answer in type: delimiters, fonts of old, wide spaces."""
    answer = plain_signs(_QUOTED.sub("", without_bold(answer.strip())))
    answer = re.sub(r"(?<!\\)\\[()\[\]]", " ", answer)
    if len(_DOLLAR.findall(answer)) % 2 == 0:  # else it is a currency
        answer = _DOLLAR.sub("", answer)
    answer = _WIDE_SPACE.sub(" ", answer)
    answer = _STYLE.sub("", _OLD_FONT.sub(lambda match: match[1] or "", answer))
    return answer.strip()


def _upright(match: re.Match[str]) -> str:
    r"""Mathematics in a font: as it is. Words: in \text{}, which math-verify takes for one symbol."""
    inner = match["inner"]
    stripped = inner.strip(" ~")
    if stripped in ("and", "or"):
        return rf"\text{{ {stripped} }}"
    if re.search(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", stripped)) is None and stripped not in ("E", "I"):
        single = re.fullmatch(r"[A-Za-z]", stripped)
        return rf"\mathrm{{{stripped}}}" if single and single[0] not in "ei" else f" {inner} " if single else inner
    return rf"\text{{{inner}}}"


def _function(match: re.Match[str]) -> str:
    name = match[1]
    return rf"\{name} " if _FUNCTIONS.fullmatch(name) else rf"\text{{{name}}}"


def _fraction(match: re.Match[str]) -> str:
    """A recurring decimal as a fraction."""
    whole, fixed, period = match.groups()
    nines = 10 ** len(period) - 1
    numerator = int((whole or "0") + fixed) * nines + int(period)
    return rf"\frac{{{numerator}}}{{{nines * 10 ** len(fixed)}}}"
