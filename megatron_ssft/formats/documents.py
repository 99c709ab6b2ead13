"""A JSON file that holds one document, as megatron-ssft evaluate and megatron-ssft evaluate-policy write it.

A document is a TypedDict: its keys are those of the file (`pass@1` among them), and it goes to `json.dumps` as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from megatron_ssft.errors import UserError

Document = TypeVar("Document")


def encode_document(record: object) -> str:
    """The text of the file. Raises ValueError for NaN and infinity, which stand as null in documents."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def read_document(
    path: Path, kind: type[Document], check: Callable[[Document], str | None], *, unreadable: str, program: str
) -> Document:
    """Read and check a document once, so that no reader has to.

    Args:
        check: what is of the right shape and does not fit together; None where nothing is.
        unreadable: for a file that is not there: what cannot be read, and what to do.
        program: what makes the file.

    Raises:
        UserError: the file cannot be read, or is not of this kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        problem = "a number is infinite or NaN" if _has_nan(value) else None
    except OSError as error:
        what, _, advice = unreadable.partition("; ")
        raise UserError(f"{path}: cannot read {what}: {error.strerror}; {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); make it anew with {program}") from error
    try:
        record = msgspec.convert(value, kind)
        problem = problem or check(record)
    except msgspec.ValidationError as error:
        problem = str(error).replace("$", "the record")
    if problem is not None:
        raise UserError(f"{path}: damaged or of another version: {problem}; make it anew with {program}")
    return record


def _has_nan(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return isinstance(value, float) and not math.isfinite(value)
