"""Rows into records and back: which field is wrong on which line, torn lines, numbers that are none."""

from __future__ import annotations

import json
import logging
import math
from typing import Annotated

import pytest
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import (
    Count,
    RowError,
    convert_row,
    parse_object,
    read_objects,
    read_rows,
    to_line,
)


class Inner(Struct, frozen=True):
    depth: int


class Example(Struct, frozen=True, kw_only=True):
    id: str
    tags: Annotated[list[Count], Meta(min_length=1, description="a list of tags")]
    inner: Inner | None = None
    value: float = 0.0
    extra: int | UnsetType = UNSET


GOOD = {"id": "a", "tags": [0, 1]}


def reason(**changes):
    with pytest.raises(RowError) as error:
        convert_row({key: value for key, value in {**GOOD, **changes}.items() if value is not ...}, Example)
    return str(error.value)


def test_the_field_is_named_in_the_words_of_the_schema():
    assert reason(tags=[]) == "'tags' must be a list of tags, not []"
    assert reason(tags=[0, -1]) == "'tags' must be a list of tags, not [0, -1]"
    assert reason(tags=...) == "'tags' is missing, it must be a list of tags"
    assert reason(id=...) == "'id' is missing"
    assert reason(id=3) == "'id': expected `str`, got `int`"
    assert reason(inner={"depth": "x"}) == "'inner.depth': expected `int`, got `str`"
    assert "'inner.depth'" in reason(inner={"depth": True}) and "'inner.depth'" in reason(inner={"depth": 1.0})
    assert len(reason(tags="x" * 1000)) < 100


def test_fields_a_record_does_not_know_are_left_out_and_unset_ones_not_written():
    record = convert_row({**GOOD, "more": 1}, Example)
    assert to_line(record) == '{"id": "a", "tags": [0, 1], "inner": null, "value": 0.0}\n'
    assert json.loads(to_line(convert_row({**GOOD, "extra": 3}, Example)))["extra"] == 3


def test_numbers_that_are_none_are_written_only_where_they_may_be():
    record = convert_row({**GOOD, "value": float("nan")}, Example)
    assert math.isnan(record.value) and "NaN" in to_line(record)
    with pytest.raises(ValueError):
        to_line(record, allow_nan=False)


def test_texts_are_ascii_and_come_back():
    record = convert_row(parse_object(b'{"id": "\\ud800 \\u2028", "tags": [0]}'), Example)
    assert to_line(record).isascii() and convert_row(json.loads(to_line(record)), Example) == record


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[1]", "expected a JSON object, found a list"),
        (b"{", "not valid JSON at column"),
        (b"\xff", "UTF-8 at byte 1"),
    ],
)
def test_lines_that_are_no_objects(tmp_path, raw, said):
    path = tmp_path / "f.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + raw + b"\n")
    with pytest.raises(UserError) as error:
        list(read_rows(path, Example, "it; check"))
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)


def test_a_torn_last_line_is_skipped_and_others_are_not(tmp_path, caplog):
    path, line = tmp_path / "f.jsonl", json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(line + line[:9])
    with caplog.at_level(logging.WARNING):
        assert [number for number, _ in read_rows(path, Example, "it; check")] == [1]
    assert f"{path}:2:" in caplog.text
    path.write_bytes(line + b"\n" + line)
    assert [number for number, _ in read_objects(path, "it; check", blank_lines=True)] == [1, 3]
    with pytest.raises(UserError, match=":2: not valid JSON"):
        list(read_objects(path, "it; check"))
    path.write_bytes(line + b'{"id": "a"}\n')
    with pytest.raises(UserError, match=r":2: 'tags' is missing, .*; repair or remove the line"):
        list(read_rows(path, Example, "it; check"))
    with pytest.raises(UserError, match=r"absent: cannot read the thing: No such file or directory; look elsewhere"):
        list(read_rows(tmp_path / "absent", Example, "the thing; look elsewhere"))
