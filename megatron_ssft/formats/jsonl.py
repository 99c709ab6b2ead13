"""Rows of JSON into typed records, and records into rows: one line each, and `file:line: what is wrong`.

A record is a `msgspec.Struct`. A field says in `Meta(description=...)` what it must be; messages quote that.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import whole_file

Row = TypeVar("Row")
Count = Annotated[int, Meta(ge=0, description="a whole number from 0")]
Name = Annotated[str, Meta(min_length=1, description="a string that is not empty")]

REPAIR = "repair or remove the line"
_MISSING = re.compile(r"Object missing required field `(.*?)`")
_PLACE = re.compile(r" - at `\$\.?([^.\[`]*)([^`]*)`$")
_SHOWN = 40
"""Characters of a wrong value that a message shows."""
_log = logging.getLogger(__name__)


class RowError(UserError):
    """A problem of one row, without its place; WrongRows puts `file:line:` in front."""


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

    def merge(self, later: WrongRows) -> None:
        """Add what another one has collected, of rows behind these."""
        self._lines += later._lines[: self.MAX_LINES - len(self._lines)]
        self._count += later._count

    def __bool__(self) -> bool:
        return self._count > 0

    def __str__(self) -> str:
        """One line per wrong row: the first MAX_LINES, then how many more."""
        more = self._count - len(self._lines)
        return "\n".join([*self._lines, *([f"... and {more} more wrong rows"] if more else [])])

    def raise_if_any(self) -> None:
        """Raise UserError with the lines of `str`."""
        if self._lines:
            raise UserError(str(self))


# -- reading ---------------------------------------------------------------------------------------------------------


def parse_json(raw: bytes) -> object:
    """The JSON value of one line. Raises RowError."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    except RowError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise RowError("not usable JSON: a number is too long or brackets are nested too deeply") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these pairs. Raises RowError for a key given twice: readers disagree on which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"key {twice!r} is given twice in one object; keep one of them")
    return found


def parse_object(raw: bytes) -> dict[str, object]:
    """The JSON object of one line. Raises RowError."""
    row = parse_json(raw)
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {kind_of(row)}")
    return row


def convert_row(row: Mapping[str, object], kind: type[Row]) -> Row:
    """The record of a parsed row. Fields it does not know are left out. Raises RowError that names the field.

    Nothing is guessed: a number is no text, true is no number, 1.0 is no whole number.
    """
    try:
        return msgspec.convert(row, kind)
    except msgspec.ValidationError as error:
        raise RowError(_explain(str(error), row, kind)) from error


def _explain(problem: str, row: Mapping[str, object], kind: type) -> str:
    """msgspec's complaint in the words of the schema."""
    place, missing = _PLACE.search(problem), _MISSING.match(problem)
    if missing is not None and place is None:
        must = _descriptions(kind).get(missing[1])
        return f"{missing[1]!r} is missing" + (f", it must be {must}" if must else "")
    if place is None or place[1] not in row:
        return problem
    if place[1] not in _descriptions(kind):
        return f"'{place[1]}{place[2]}': {problem[: place.start()].lower()}"
    return must_be(place[1], row[place[1]], kind)


def must_be(field: str, value: object, kind: type) -> str:
    """`'field' must be this, not that`: what the schema says of a field, and the wrong value."""
    text = textwrap.shorten(json.dumps(value), _SHOWN)
    return f"{field!r} must be {_descriptions(kind)[field]}, not {text}"


@functools.cache
def _descriptions(kind: type) -> dict[str, str]:
    """Field -> what it must be, as its annotation says."""
    return {
        name: meta.description
        for name, annotation in get_type_hints(kind, include_extras=True).items()
        for meta in getattr(annotation, "__metadata__", ())
        if isinstance(meta, Meta) and meta.description is not None
    }


def read_objects(path: Path, missing: str, *, blank_lines: bool = False) -> Iterator[tuple[int, dict[str, object]]]:
    """Every row of a log as (1-based line, object); a last line that a killed writer left unfinished is skipped.

    `missing`: what cannot be read and what to do, for a file that is not there. `blank_lines`: whether empty lines are
    passed over. Raises UserError.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        what, _, advice = missing.partition("; ")
        raise UserError(f"{path}: cannot read {what}: {error.strerror or error}; {advice}") from error
    with file:
        for number, raw in enumerate(file, start=1):
            if blank_lines and not raw.strip():
                continue
            try:
                row = parse_json(raw)
            except RowError as error:
                if not raw.endswith(b"\n"):
                    _log.warning("%s:%d: last line is unfinished and was ignored", path, number)
                    return
                raise UserError(f"{path}:{number}: {error}; {REPAIR}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {kind_of(row)}; {REPAIR}")
            yield number, row


def read_rows(path: Path, kind: type[Row], missing: str, *, blank_lines: bool = False) -> Iterator[tuple[int, Row]]:
    """The rows of `read_objects` as records. Raises UserError `file:line: ...`."""
    for number, row in read_objects(path, missing, blank_lines=blank_lines):
        yield number, convert_line(path, number, row, kind)


def convert_line(path: Path, number: int, row: Mapping[str, object], kind: type[Row]) -> Row:
    """`convert_row` of line `number` of a log. Raises UserError `file:line: ...`."""
    try:
        return convert_row(row, kind)
    except RowError as error:
        raise UserError(f"{path}:{number}: {error}; {REPAIR}") from error


# -- writing ---------------------------------------------------------------------------------------------------------


def to_object(record: msgspec.Struct) -> dict[str, object]:
    """The fields of a record under the names they have in files, in order; those that are unset are left out."""
    fields = zip(record.__struct_encode_fields__, record.__struct_fields__)
    values = ((name, getattr(record, field)) for name, field in fields)
    return {name: value for name, value in values if value is not msgspec.UNSET}


def to_line(record: msgspec.Struct, *, allow_nan: bool = True) -> str:
    """The record as one line, pure ASCII: texts may hold line separators and halves of surrogate pairs."""
    return json.dumps(to_object(record), allow_nan=allow_nan) + "\n"


def write_objects(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object per line, letters spelled out; the file appears whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# -- single values ---------------------------------------------------------------------------------------------------


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
    """The kind of a JSON value, for messages."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a string"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"
