"""Integers of more than 4,300 digits, which Python does not read by default because it takes quadratic time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def any_integer_length() -> Iterator[None]:
    """Lift the limit in this process, all threads of it; only where something else limits the time."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)
