"""Notes of samples that could not be generated, beside the file that lacks them."""

from __future__ import annotations

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.failed_samples import (
    FailedSample,
    carry_over,
    failed_path,
    kinds,
    read_failed,
    without_samples,
    write_failed,
)
from tests.helpers.scored_rows import scored

ROWS = [
    FailedSample(id="q1", slot=0, sample=2, reason='finish_reason "abort"'),
    FailedSample(id="q1", slot=None, sample=0, reason="status 500: engine died"),
    FailedSample(id="q2", slot=1, sample=0, reason="status 500: something else"),
]


def test_notes_come_back_and_go_when_nothing_is_missing(tmp_path):
    path = tmp_path / "r.jsonl"
    assert read_failed(path) == []
    write_failed(path, ROWS)
    assert failed_path(path).name == "r.failed.jsonl" and read_failed(path) == ROWS
    write_failed(path, [])
    assert list(tmp_path.iterdir()) == []


def test_what_the_file_holds_is_not_missing(tmp_path):
    write_failed(tmp_path / "r.jsonl", ROWS)
    assert read_failed(tmp_path / "r.jsonl", {("q1", None, 0), ("q2", 0, 0)}) == [ROWS[0], ROWS[2]]
    assert carry_over(tmp_path / "r.jsonl", tmp_path / "s.jsonl", {ROWS[0].key}) == ROWS[1:]
    assert read_failed(tmp_path / "s.jsonl") == ROWS[1:]


def test_reasons_are_counted_by_their_kind():
    assert kinds(ROWS) == 'status 500 2, finish_reason "abort" 1'


@pytest.mark.parametrize("name", ["r.jsonl", "r", "r.json", ".jsonl"])
def test_the_note_never_has_the_name_of_its_file(tmp_path, name):
    assert failed_path(tmp_path / name) != tmp_path / name


@pytest.mark.parametrize("content", ['{"id": "q", "text": "a"}\n', "no JSON\n", '{"id": "q", "slot": 1}\n'])
def test_another_file_of_that_name_is_left_alone(tmp_path, content):
    path = tmp_path / "r.jsonl"
    failed_path(path).write_text(content)
    for call in (lambda: write_failed(path, []), lambda: write_failed(path, ROWS), lambda: read_failed(path)):
        with pytest.raises(UserError, match=r"r\.failed\.jsonl:1: not a note of failed samples.*move the file away"):
            call()
    assert failed_path(path).read_text() == content


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot"):
        write_failed(tmp_path / "file" / "r.jsonl", ROWS)


def test_questions_without_any_sample_under_a_tag():
    rows = [scored("q1", 0, 0, "1"), scored("q2", 0, 0, "1")]
    failed = [ROWS[0], ROWS[2], FailedSample(id="q3", slot=0, sample=0, reason="x")]
    assert without_samples(rows, failed) == {"q2", "q3"}
