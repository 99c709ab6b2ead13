"""Final answers as sympy expressions: read by math-verify, numbers exact, and safe to evaluate or known huge."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_ssft.scoring.verifiers.math_library import library, read

if TYPE_CHECKING:  # takes a second, and the other verifiers have no need of it
    import sympy

_HUGE_EXPONENT = 20_000
_MOST_DIGITS = 20_000
_FLOAT_DIGITS = 6
"""A decimal is right for another number if it agrees in so many digits behind the point, not counting leading zeros."""
_ONLY_NUMBERS = re.compile(r"[\d\s.,+\-*/^()×÷]+")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b|\\cup")
_AND = re.compile(r"\\text\s*\{\s*and\s*\}|\band\b|\\land(?![a-z])|\\wedge|\\text\s*\{\s*,\s*\}")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|leq|geq|ne|neq|leqslant|geqslant)(?![A-Za-z])")


@functools.lru_cache(maxsize=64)
def parsed(answer: str) -> tuple[object, ...]:
    """Read a normalised final answer: an expression if it is one, then the text itself."""
    solutions = _solution_set(answer)
    if solutions is not None:
        return solutions, answer
    return tuple(map(_exact, map(_with_imaginary_unit, _read(_plus_minus_apart(answer)))))


def same(gold: tuple[object, ...], answer: tuple[object, ...]) -> bool:
    """Whether math-verify finds what `parsed` returned equal, with as many digits as the numbers need."""
    import sympy

    both = [item for item in (*gold, *answer) if isinstance(item, (sympy.Basic, sympy.MatrixBase))]
    if any(map(is_huge, both)) or (digits := sum(map(_digits, both))) > _MOST_DIGITS:
        return any(g == a for g in gold for a in answer)
    has_decimal = any(item.has(sympy.Float) for item in both)
    verify = functools.partial(
        library().verify,
        float_rounding=_FLOAT_DIGITS + (max(map(_leading_zeros, both)) if has_decimal else 0),
        numeric_precision=20 + int(digits),
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )
    if len(both) == 2 and all(isinstance(item, sympy.Eq) for item in both) and both[0] != both[1]:
        return _same_equations(both[0], both[1], verify)
    return verify(list(gold), list(answer))


def _same_equations(gold: sympy.Eq, answer: sympy.Eq, verify: Callable[[object, object], bool]) -> bool:
    """Compare equations, which are all the same to math-verify if it can solve none, such as those of vectors."""
    import sympy

    nodes = (*sympy.preorder_traversal(gold), *sympy.preorder_traversal(answer))
    if any(isinstance(node, (sympy.MatrixBase, sympy.MatrixExpr)) for node in nodes):
        return verify(gold.lhs, answer.lhs) and verify(gold.rhs, answer.rhs)
    if gold.lhs == answer.lhs and verify(gold.rhs, answer.rhs):
        return True
    if not verify(gold, answer):
        return False
    difference, other = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    if 0 in (sympy.simplify(difference - other), sympy.simplify(difference + other)):
        return True
    try:
        return bool(sympy.solve(gold, gold.free_symbols))
    except NotImplementedError:
        return False


def _read(answer: str) -> list[object]:
    """Read an answer; numbers without LaTeX are looked for only where there is nothing else."""
    return read(rf"\boxed{{{answer}}}", plain_numbers=_ONLY_NUMBERS.fullmatch(answer) is not None)


def _solution_set(answer: str) -> sympy.Set | None:
    """Read inequalities joined by `or` or `and` as the set of their solutions; None for anything else."""
    import sympy

    for joint, operation in ((_OR, sympy.Union), (_AND, sympy.Intersection)):
        parts = joint.split(answer)
        if len(parts) > 1 and all(map(_INEQUALITY.search, parts)):
            readings = [next(iter(_read(part)), None) for part in parts]
            relations = [reading for reading in readings if isinstance(reading, sympy.Basic)]
            if len(relations) < len(parts):
                return None
            symbols = {symbol for relation in relations for symbol in relation.free_symbols}
            if len(symbols) != 1:
                return None
            try:
                return operation(*(relation.as_set() for relation in relations))
            except (AttributeError, NotImplementedError, TypeError, ValueError):
                return None
    return None


def _plus_minus_apart(answer: str) -> str:
    r"""Write an element a \pm b of a list as two."""
    elements = split_at_top(answer)
    if len(elements) < 2 or not any(element.count(r"\pm") == 1 for element in elements):
        return answer
    apart: list[str] = []
    for element in elements:
        is_double = element.count(r"\pm") == 1 and r"\mp" not in element
        apart += [element.replace(r"\pm", sign) for sign in "+-"] if is_double else [element]
    return ",".join(apart)


def split_at_top(answer: str) -> list[str]:
    """Split at commas and semicolons that stand in no brackets."""
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(answer):
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0 and answer[place - 1 : place] != "\\":
            parts.append(answer[begin:place])
            begin = place + 1
    return [*parts, answer[begin:]]


def _with_imaginary_unit(expression: object) -> object:
    """Replace `i`, a symbol like any other to math-verify, by the number."""
    import sympy

    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)) or is_huge(expression):
        return expression
    units = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return _replaced(expression, units)


def _exact(expression: object) -> object:
    """Make decimals within larger expressions fractions; those that stand alone may be rounded and stay as they are."""
    import sympy

    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)) or not expression.has(sympy.Float):
        return expression
    larger = [element for element in _elements(expression) if not _is_decimal(element)]
    exact = {
        element: element.xreplace(
            {number: sympy.Rational(str(number)) for number in element.atoms(sympy.Float) if number.is_finite}
        )
        for element in larger
        if element.has(sympy.Float)
    }
    return _replaced(expression, exact)


def _replaced(expression: sympy.Basic | sympy.MatrixBase, replacements: dict) -> object:
    """Replace parts of an expression, which stays as it is where the new one makes no sense to sympy."""
    try:
        return expression.xreplace(replacements) if replacements else expression
    except (AttributeError, TypeError):  # math-verify's And that sympy simplifies away; i > 3
        return expression


def _is_decimal(expression: sympy.Basic) -> bool:
    """Whether it is a number, or a number of percent, as math-verify writes them."""
    import sympy

    percent = isinstance(expression, sympy.Mul) and expression.has(sympy.UnevaluatedExpr) and len(expression.args) == 2
    return isinstance(expression.args[0] if percent else expression, sympy.Number)


def _elements(expression: sympy.Basic | sympy.MatrixBase) -> Iterator[sympy.Basic]:
    """The expressions that math-verify compares one by one: of sets, tuples, matrices and relations."""
    import sympy
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import BooleanFunction

    if isinstance(expression, sympy.MatrixBase):
        for entry in expression.flat():
            yield from _elements(entry)
    elif isinstance(expression, (sympy.Set, sympy.Tuple, Relational, BooleanFunction)):
        for part in expression.args:
            yield from _elements(part)
    else:
        yield expression


def _leading_zeros(expression: sympy.Basic | sympy.MatrixBase) -> int:
    """Most zeros between the point and the first digit, over the numbers in an expression."""
    import sympy

    zeros = 0
    for element in _elements(expression):
        if isinstance(element, sympy.Expr) and element.is_number and not element.has(sympy.oo, sympy.zoo, sympy.nan):
            try:
                size = sympy.log(sympy.Abs(element.doit()).evalf(15), 10).evalf(15)
                zeros = max(zeros, -int(sympy.floor(size)) - 1)
            except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
                continue  # zero, or a number that sympy cannot place
    return zeros


def _digits(expression: sympy.Basic | sympy.MatrixBase) -> float:
    """How many decimal digits the numbers in an expression have before and behind the point, together."""
    import sympy

    total = 0.0
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, sympy.Rational):
            total += math.log10(abs(node.p) or 1) + math.log10(node.q)
        elif isinstance(node, sympy.Float):
            total += abs(math.log10(_size(node) or 1))
        elif isinstance(node, sympy.Pow) and node.is_number:
            exponent, base = _size(node.exp), _size(node.base)
            total += exponent * abs(math.log10(base)) if exponent and base else 0
        elif isinstance(node, (sympy.exp, sympy.sinh, sympy.cosh)) and node.is_number:
            total += _size(node.args[0])
        elif isinstance(node, sympy.factorial) and node.is_number:
            total += math.lgamma(_size(node.args[0]) + 1)
    return total


def is_huge(expression: object) -> bool:
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
