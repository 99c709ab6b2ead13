"""A log where a run goes on loses what is behind the checkpoint, and nothing else; one that ends early is refused."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.log_cut import UNREADABLE, cut_log, refuse_short_log


def line(iteration, **more):
    return json.dumps({"iteration": iteration} | more).encode() + b"\n"


LINES = [line(i, loss=1 / i) for i in range(1, 34)]
WHOLE = b"".join(LINES)
GARBAGE = {
    "empty line": b"\n",
    "zeros": b"\0\0\0\0\0\0\n",
    "no step": b"{}\n",
    "a list": b"[]\n",
    "a number": b"3\n",
    "step as text": b'{"iteration": "1"}\n',
    "step as truth": b'{"iteration": true}\n',
    "no UTF-8": b'{"iteration": 1, "loss": "\xff"}\n',
    "null": b"null\n",
    "half a line": LINES[0][:7] + b"\n",
    "nested": b"[" * 100_000 + b"\n",
}


@pytest.fixture
def cut(tmp_path):
    """cut(content, first) -> (what is left, what is beside it, remarks)."""

    def call(content, first):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(content)
        remarks = cut_log(path, first)
        beside = tmp_path / f"metrics.jsonl{UNREADABLE}"
        return path.read_bytes(), beside.read_bytes() if beside.exists() else b"", remarks

    return call


@pytest.mark.parametrize("first", range(2, 36))
def test_only_lines_from_a_step_on_are_cut(cut, first):
    assert cut(WHOLE, first) == (b"".join(LINES[: first - 1]), b"", [])


def test_all_lines_of_a_step_go_together(cut):
    """assignments.jsonl holds a line per question."""
    content = line(1, id="a") + line(1, id="b") + line(2, id="c") + line(2, id="d") + line(3, id="e")
    assert cut(content, 2)[0] == line(1, id="a") + line(1, id="b")
    assert cut(content, 3)[0] == content[: -len(line(3, id="e"))]


@pytest.mark.parametrize("length", range(1, len(line(34, loss=0.5))))
def test_a_torn_last_line_is_cut(cut, length):
    assert cut(WHOLE + line(34, loss=0.5)[:length], 99) == (WHOLE, b"", [])


@pytest.mark.parametrize("place", [0, 1, 17, 33])
@pytest.mark.parametrize("name", GARBAGE)
def test_a_line_that_cannot_be_read_costs_no_other_line(cut, name, place):
    content = b"".join([*LINES[:place], GARBAGE[name], *LINES[place:]])
    left, beside, remarks = cut(content, 34)
    assert (left, beside) == (WHOLE, GARBAGE[name])
    (remark,) = remarks
    assert f"line {place + 1} cannot be read" in remark and f"metrics.jsonl{UNREADABLE}" in remark


def test_a_damaged_line_and_lines_behind_the_checkpoint(cut):
    left, beside, _ = cut(b"\0\n" + WHOLE, 11)
    assert (left, beside) == (b"".join(LINES[:10]), b"\0\n")


def test_many_damaged_lines_are_counted_in_one_remark(cut):
    (remark,) = cut(b"\0\n" * 50 + WHOLE, 34)[2]
    assert "and 40 more" in remark and len(remark) < 300


def test_a_start_that_left_no_checkpoint_is_begun_anew_and_said(cut):
    left, _, remarks = cut(WHOLE, 1)
    assert left == b"" and "dropped 33 lines" in remarks[0]
    assert cut(line(0) + line(0), 1) == (b"", b"", [])  # of the model as it was given, before any step


def test_an_empty_file_stays_empty(cut):
    assert cut(b"", 5) == (b"", b"", [])


def test_an_absent_file_stays_absent_and_is_said_where_it_should_be_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_log(path, 5) == [] and cut_log(path, 1, is_continued=True) == []
    assert cut_log(path, 5, is_continued=True) == [f"{path}: is not there; it begins at step 5"]
    assert list(tmp_path.iterdir()) == []


def test_an_intact_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE)
    inode = path.stat().st_ino
    cut_log(path, 34)
    cut_log(path, 30)
    assert (path.read_bytes(), path.stat().st_ino) == (b"".join(LINES[:29]), inode)


def refusal(path, content, iteration):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        refuse_short_log(path, iteration)
    assert path.read_bytes() == content
    return str(caught.value)


def test_a_log_that_ends_before_the_checkpoint_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = refusal(path, b"".join(LINES[:10]), 20)
    assert text.startswith(f"{path}: has no line of step 20") and "step 10" in text and "move this one away" in text
    assert "step 0)" in refusal(path, b"", 20)
    refusal(path, b"".join(LINES[:19] + LINES[20:]), 20)  # a hole at the checkpoint
    refusal(path, b"".join(LINES[:20])[:-1], 20)  # its line is torn
    for content in (WHOLE, b"".join(LINES[:20]), b"\0\n" + WHOLE):
        path.write_bytes(content)
        refuse_short_log(path, 20)


def test_a_log_that_was_moved_away_is_not_refused(tmp_path):
    refuse_short_log(tmp_path / "metrics.jsonl", 20)
