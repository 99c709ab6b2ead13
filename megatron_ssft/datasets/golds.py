r"""Gold answers of releases as texts: numbers spelled out, solutions cut down to their last \boxed{}, NaN refused.

A release that passed through a table program holds NaN where nothing was, and floats where integers were.
"""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal

from megatron_ssft.boxed import last_boxes
from megatron_ssft.datasets.tables import Row
from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of

REDUCED = r"golds cut down to their last \boxed{}"
FROM_SOLUTION = r"golds taken from the last \boxed{} of 'solution'"

_NOT_A_VALUE = ("nan", "<na>", "nat")
"""How table programs spell a missing value, in lower case."""
_BOXES = (r"\boxed", r"\fbox")


def gold_text(value: object, what: str) -> str:
    """A text or a number as a text without spaces around it; 25.0 is 25, and 1e-07 is spelled out.

    Raises RowError, which calls the value `what`, for anything else, for NaN and infinity, and for a blank text.
    """
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _number_text(value, what)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{what} must be a text or a number, not {kind_of(value)}")
    text = filled_string(value, what).strip()
    if text.lower() in _NOT_A_VALUE:
        raise RowError(f"{what} is {text}, which stands for a missing value; give the answer or remove the row")
    return text


def _number_text(value: int | float | Decimal, what: str) -> str:
    if not math.isfinite(value):
        raise RowError(f"{what} is {value}, which is no answer; give the answer or remove the row")
    if value == int(value):
        return str(int(value))
    return format(Decimal(repr(value)) if isinstance(value, float) else value, "f")


def last_box(text: str, what: str) -> str | None:
    r"""Content of the last \boxed{}; several that belong together are joined by commas; None without any box.

    Raises RowError, which calls the text `what`, for boxes that are empty or never closed.
    """
    _, boxes = last_boxes(text)
    content = ", ".join(box.strip() for box in boxes if box.strip())
    if not content and any(box in text for box in _BOXES):
        raise RowError(rf"{what} has a \boxed{{}} that is empty or never closed; give the answer or remove the row")
    return content or None


def gold_of(value: object, what: str, notes: Counter[str]) -> str:
    r"""`gold_text`, cut down to its last \boxed{} where it has one: some copies give the whole solution as the answer.

    Raises RowError. What is cut down is counted in `notes`.
    """
    text = gold_text(value, what)
    content = last_box(text, what)
    if content is None:
        return text
    notes[REDUCED] += 1
    return gold_text(content, f"the last box of {what}")


def gold_in(row: Row, notes: Counter[str]) -> str | None:
    r"""The gold answer of a row of mathematics: `answer`, `final_answer`, or the last \boxed{} of `solution`.

    None where the row has none of them. Raises RowError for one that is no answer.
    """
    solution = row.get("solution")
    for name in ("answer", "final_answer"):
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip() and solution is not None):
            continue  # a blank cell of a CSV file
        return gold_of(value, repr(name), notes)
    if solution is None:
        return None
    content = last_box(filled_string(solution, "'solution'"), "'solution'")
    if content is None:
        raise RowError(r"'answer' is missing, and 'solution' has no \boxed{} that would hold it")
    notes[FROM_SOLUTION] += 1
    return gold_text(content, "the last box of 'solution'")
