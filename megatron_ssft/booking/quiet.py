"""Imports nothing, so that a new process can be made quiet before it imports anything that talks."""

from __future__ import annotations

import warnings


def ignore_warnings() -> None:
    """Of libraries; they are the parent's to show."""
    warnings.simplefilter("ignore")
