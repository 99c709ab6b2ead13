"""math-verify, imported when it is needed (it takes a second), and how it is asked to read."""

from __future__ import annotations

import functools
import logging
from types import ModuleType


@functools.cache
def library() -> ModuleType:
    """Import math_verify."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarm is off
    return math_verify


def read(text: str, *, plain_numbers: bool) -> list[object]:
    """Find mathematics in a text: an expression if it can be read, then the words that it stands in.

    `plain_numbers`: take numbers that are not in LaTeX as well, from the last one that there is.
    """
    latex, plain = _configurations()
    return library().parse(text, (latex, plain) if plain_numbers else (latex,), parsing_timeout=None)


@functools.cache
def _configurations() -> tuple[object, object]:
    """For LaTeX and for plain numbers. Left to itself math-verify takes `t`, `way` and `e }` at the end for units."""
    from latex2sympy2_extended import NormalizationConfig

    normalization = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    latex = library().LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    return latex, library().ExprExtractionConfig()
