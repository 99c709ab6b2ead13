"""Files of one JSON object per line: what is wrong with a row, and where."""

from __future__ import annotations

import json
from os import PathLike

from megatron_ssft.errors import UserError


class RowError(UserError):
    """What is wrong with one row, without its place; WrongRows puts `file:line:` in front."""


class WrongRows:
    """Collects the wrong rows, so that one start of the program reports them all."""

    MAX_LINES = 20

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def add(self, file: str | PathLike[str], line: int, reason: object) -> None:
        """Note that `line` (1-based) of `file` is wrong because of `reason`."""
        self._count += 1
        if len(self._lines) < self.MAX_LINES:
            self._lines.append(f"{file}:{line}: {reason}")

    def add_unreadable(self, file: str | PathLike[str], error: OSError) -> None:
        """Note that `file` could not be read."""
        self.add(file, 1, f"cannot read the file: {error.strerror or error}")

    def raise_if_any(self) -> None:
        """Raises UserError with one line a wrong row (the first MAX_LINES, then how many more)."""
        if self._count > len(self._lines):
            raise UserError("\n".join([*self._lines, f"... and {self._count - len(self._lines)} more wrong rows"]))
        if self._lines:
            raise UserError("\n".join(self._lines))


def parse_json(raw: bytes) -> object:
    """The JSON value of one line. Raises RowError."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise RowError("not usable JSON: a number is too long or brackets are nested too deeply") from error


def plain_string(value: object, what: str) -> str:
    """`value` where it is text that can be encoded. Raises RowError led by `what`."""
    if value is None:
        raise RowError(f"{what} is missing")
    if not isinstance(value, str):
        raise RowError(f"{what} must be a string, not {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, tokenizers cannot read it
        raise RowError(f"{what} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def filled_string(value: object, what: str) -> str:
    """`plain_string` that is neither empty nor blank. Raises RowError led by `what`."""
    text = plain_string(value, what)
    if not text.strip():
        raise RowError(f"{what} is {'blank' if text else 'empty'}")
    return text


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a string"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"
