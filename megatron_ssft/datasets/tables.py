"""Rows of the files that data sets are released as: JSONL, JSON, CSV, parquet; the first three also gzipped.

Rows come one at a time. What is wrong with a row does not end the file: it comes in the row's place, so that one start
of a program reports all of them.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from megatron_ssft.data.examples import parse_row
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows, kind_of, parse_json

Row = dict[str, object]
Progress = Callable[[int], None]
"""Called now and then with the number of bytes read, of `total_bytes`."""
Parsed = TypeVar("Parsed")

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_AFTER_ITEM = re.compile(r"\s*([,\]]?)\s*")
_MAX_CELL = 1 << 30
_ROWS_A_REPORT = 64
_MOST_FIELDS = 16


def check_row(row: Row, *, traces_required: bool = True) -> None:
    """Raises RowError unless the training reader accepts `row`; a question to be answered needs no traces."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("a text holds half of a surrogate pair; remove it") from error
    if not traces_required and row.get("traces") is None:
        row = {**row, "traces": [{"text": "none"}]}
    parse_row(json.dumps(row, default=str).encode("ascii"), "", 0)


def question_key(row: Row) -> str:
    """A hash (32 hexadecimal digits) of what is asked, the same for the same words with other spaces between them."""
    messages = row.get("messages")
    turns = (
        messages
        if isinstance(messages, list) and messages
        else [{"role": "user", "content": row.get("question") or ""}]
    )
    parts: list[object] = [[turn["role"], " ".join(str(turn["content"]).split())] for turn in turns]
    if row.get("prompt") is not None:
        parts = ["verbatim", row["prompt"]]
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:32]


def total_bytes(paths: Sequence[Path]) -> int:
    """Size of the files that are there."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def parsed_rows(
    paths: Sequence[Path], parse: Callable[[Row], Parsed], wrong: WrongRows, progress: Progress | None = None
) -> Iterator[tuple[Path, int, Parsed]]:
    """(file, 1-based line, `parse` of the row) for the rows that `parse` takes; the others are noted in `wrong`.

    `parse` raises RowError for a row it refuses. The line of a parquet row is its number. Raises UserError for a file
    of another kind, or for parquet without pyarrow.
    """
    before = 0
    for path in paths:
        rows = 0
        try:
            for line, row, place in _rows(path):
                rows += 1
                if progress is not None and rows % _ROWS_A_REPORT == 0:
                    progress(before + place)
                try:
                    if isinstance(row, RowError):
                        raise row
                    parsed = parse(row)
                except RowError as error:
                    wrong.add(path, line, error)
                else:
                    yield path, line, parsed
        except OSError as error:
            wrong.add_unreadable(path, error)
        except (EOFError, zlib.error):
            wrong.add(path, 1, "the compressed file is damaged or cut off; fetch it again")
        else:
            if rows == 0:
                wrong.add(path, 1, "the file is empty; expected rows")
        before += total_bytes([path])
        if progress is not None:
            progress(before)


def _rows(path: Path) -> Iterator[tuple[int, Row | RowError, int]]:
    """(line, row, bytes read so far). Raises OSError, EOFError, zlib.error, UserError."""
    compressed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if compressed else path.name).suffix.lower()
    if suffix not in _SUFFIXES or (compressed and suffix == ".parquet"):
        raise UserError(f"{path}: not a file that can be read here; convert it to one of {', '.join(_SUFFIXES)}")
    with open(path, "rb") as raw:
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if compressed else raw
        if suffix in (".csv", ".tsv"):
            rows = _csv_rows(stream, "," if suffix == ".csv" else "\t")
        elif suffix == ".parquet":
            rows = _parquet_rows(path)
        elif suffix == ".json":
            rows = _json_rows(stream)
        else:
            rows = _jsonl_rows(stream)
        for line, row in rows:
            yield line, row, raw.tell()


def _jsonl_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RowError]]:
    for line, raw in enumerate(stream, start=1):
        if line == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.strip():
            try:
                yield line, _as_row(parse_json(raw))
            except RowError as error:
                yield line, error


def _as_row(value: object) -> Row | RowError:
    return value if isinstance(value, dict) else RowError(f"expected a JSON object, found {kind_of(value)}")


def _json_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RowError]]:
    """The items of a list; a file that does not begin with a bracket is taken for JSONL under another name."""
    data = stream.read().removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        yield from _jsonl_rows(io.BytesIO(data))
        return
    line, counted = 1, 0
    try:
        text = data.decode("utf-8")
        _, place = _after_item(text, text.index("[") + 1)
        while not text.startswith("]", place):
            line, counted = line + text.count("\n", counted, place), place
            value, end = json.JSONDecoder().raw_decode(text, place)
            yield line, _as_row(value)
            separator, place = _after_item(text, end)
            if separator == "]":
                return
            if separator != ",":
                raise json.JSONDecodeError("a comma or ] is missing", text, end)
    except UnicodeDecodeError as error:
        yield 1, RowError(f"not valid UTF-8 at byte {error.start + 1} of the file; save the file as UTF-8")
    except json.JSONDecodeError as error:
        yield error.lineno, RowError(f"not valid JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError):
        yield line, RowError("not usable JSON: a number is too long or brackets are nested too deeply")


def _after_item(text: str, place: int) -> tuple[str, int]:
    """Separator behind an item (a comma, ] or nothing; spaces do not count), and where it ends."""
    match = _AFTER_ITEM.match(text, place)
    assert match is not None, "the pattern matches the empty text"
    return match[1], match.end()


def _csv_rows(stream: BinaryIO, delimiter: str) -> Iterator[tuple[int, Row | RowError]]:
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        names = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(names):
                yield line, dict(zip(names, cells))
            elif cells:
                yield line, RowError(f"the row has {len(cells)} cells, the header {len(names)}; is the quoting right?")
            line = reader.line_num + 1
    except UnicodeDecodeError:
        yield line, RowError("not valid UTF-8 from about here on; save the file as UTF-8")
    except csv.Error as error:
        yield line, RowError(f"not valid CSV: {error}")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading parquet takes pyarrow, which is not installed; install it or convert the file to JSONL"
        ) from error
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except pyarrow.ArrowException as error:
        yield line + 1, RowError(f"not a parquet file that can be read: {str(error).splitlines()[0]}")


def folded(row: Mapping[str, object]) -> Row:
    """The row with field names in lower case, since releases of one set differ in it, without what is null."""
    return {name.strip().lower(): value for name, value in row.items() if value is not None}


def fields_of(row: Mapping[str, object]) -> str:
    """The field names of a row, for messages."""
    names = sorted(row)
    return ", ".join(names[:_MOST_FIELDS]) + (", ..." if len(names) > _MOST_FIELDS else "") if names else "none"
