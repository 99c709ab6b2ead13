"""Question sets with traces of several teachers: the example of this repository, and a larger one where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = _ROOT / "examples" / "data" / "arithmetic_teachers.jsonl"
_LARGER = _ROOT.parent / "shared" / "data" / "gsm8k_teachers.jsonl"

TEACHER_SETS = [
    pytest.param(EXAMPLE, id="example"),
    pytest.param(
        _LARGER, id="larger", marks=pytest.mark.skipif(not _LARGER.is_file(), reason="the larger set is not here")
    ),
]
