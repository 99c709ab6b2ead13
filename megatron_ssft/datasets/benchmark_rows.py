"""What the readers of evaluation sets share: their options, and fields of a row whose names differ between copies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_ssft.datasets.prompts import Wording
from megatron_ssft.datasets.tables import Row, fields_of, question_key
from megatron_ssft.formats.jsonl import RowError, filled_string

_ID_FIELDS = ("record id", "id", "unique_id", "question_id", "problem_id")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the readers of evaluation sets."""

    seed: int = 0
    """GPQA: decides, with the question's id, the order of its choices."""
    since: str | None = None
    """LiveCodeBench: the first contest date that counts, YYYY-MM-DD."""
    until: str | None = None
    """LiveCodeBench: the last one."""
    wording: Wording | None = None
    """How questions are asked; None: in our own words."""


Reader = Callable[[Row, BenchmarkOptions, Counter[str]], Row | None]
"""A row of a release, its field names in lower case and without nulls, to a row of a questions file.

None for a row that is left out. The counter takes remarks: what was changed or left out, and how often. Raises
RowError.
"""


def missing(row: Row, *names: str) -> RowError:
    """The error that none of the fields is there."""
    return RowError(f"{' or '.join(map(repr, names))} is missing; is --format right? The fields are {fields_of(row)}")


def text_in(row: Row, *names: str) -> str:
    """The first of the fields that is there. Raises RowError."""
    for name in names:
        if name in row:
            return filled_string(row[name], repr(name))
    raise missing(row, *names)


def row_id(row: Row, benchmark: str, question: str) -> str:
    """The release's own id under the name of the set; a hash of the question where the release has none."""
    for name in _ID_FIELDS:
        value = row.get(name)
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)  # a column of integers with gaps, from a table program
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return f"{benchmark}-{str(value).strip()}"
    return f"{benchmark}-{question_key({'question': question})[:12]}"


def facts_in(row: Row, names: Iterable[str]) -> Row:
    """Those of the fields that hold a text or a number: what results may be grouped by."""
    facts = {name: row.get(name) for name in names}
    return {name: value for name, value in facts.items() if isinstance(value, (str, int)) or _is_finite(value)}


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
