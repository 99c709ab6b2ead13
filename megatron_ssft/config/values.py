"""How the values of settings are spelled, in flags and files alike."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,30})", re.ASCII)
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def number(text: str) -> float:
    """A decimal number, nan or inf. Raises ValueError: also for 007, 1_000 and 12:30, which many take for others."""
    if not _NUMBER.fullmatch(text.strip()) and text.strip().lower() not in ("nan", "inf"):
        raise ValueError("write a decimal number, without leading zeros and separators")
    return float(text)


def integer(text: str) -> int:
    """A whole number; 7.0 and 1e3 are ones too. Raises ValueError, as `number`."""
    if _INTEGER.fullmatch(text.strip()):
        return int(text)
    value = number(text)
    if not value.is_integer():
        raise ValueError("write a whole number")
    return int(value)


def path(text: str) -> str:
    """The path with ~ and $VARIABLES replaced, unless it names a file as it stands. Raises ValueError.

    What a run records are paths from the root, so the working folder has to be one that can be written down, too.
    """
    if "$" in text and not os.path.exists(text):
        text = os.path.expandvars(text)
        unset = _VARIABLE.search(text)
        if unset is not None:
            raise ValueError(f"the environment has no variable {unset[0]}")
    home = os.path.expanduser(text)
    if text.startswith("~") and home == text:
        raise ValueError(f"there is no user {text.split('/')[0][1:]!r}")
    text_in_utf8(home)
    try:
        text_in_utf8(os.path.abspath(home))
    except FileNotFoundError:
        raise ValueError("seen from a working folder that is gone; go to another one") from None
    except ValueError:
        raise ValueError("seen from a working folder whose name is not valid UTF-8; go to another one") from None
    return home


def text_in_utf8(text: str) -> str:
    """The text itself. Raises ValueError where it cannot be written into a file: bytes of another encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not valid UTF-8; write it so, or rename what it names") from None
    return text


def reader(kind: type, is_path: bool) -> Callable[[str], object]:
    """What turns a word into a value of type `kind`, by raising ValueError where it cannot."""
    if is_path:
        return lambda text: kind(path(text))
    readers: dict[type, Callable[[str], object]] = {int: integer, float: number, str: text_in_utf8}
    return readers.get(kind, kind)
