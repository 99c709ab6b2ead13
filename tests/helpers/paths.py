"""Folders that tests look at."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

_BESIDE = ROOT.parent / "shared"
SHARED = _BESIDE if _BESIDE.is_dir() else None
"""Larger public data sets, beside the checkout on some machines; None elsewhere."""
GSM8K_TEACHERS = _BESIDE / "data" / "gsm8k_teachers.jsonl"
"""GSM8K questions with traces of several teachers. Tests of it are skipped where it is absent."""
