"""Bars and plain lines: what passes through, what is printed and how often."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_ssft import progress
from megatron_ssft.progress import Pace, ProgressLines, Wording, bytes_read, track

WORDING = Wording("counting", "{done} of {total}{speed}", "{done} of {total} before")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_a_line_is_due_once_the_seconds_are_over(clock):
    pace = Pace(10.0)
    answers = []
    for seconds in (5, 5, 1, 5, 6):
        clock[0] += seconds
        answers.append(pace.is_due())
    assert answers == [False, False, True, False, True]


def test_a_callback_prints_now_and_then(clock, capsys):
    lines = ProgressLines("tokenizing {done}/{total}")
    for done in range(1, 5):
        clock[0] += 3.0
        lines(done, 4)
    assert capsys.readouterr().out == "tokenizing 2/4\ntokenizing 4/4\n"


@pytest.mark.parametrize("last_line", [False, True])
def test_items_pass_through_and_plain_lines_say_how_far(clock, last_line):
    console = plain()
    wording = Wording(WORDING.doing, WORDING.line, WORDING.before, last_line)
    passed = []
    for item in track("abcd", console, wording, done=1, total=5, speed=lambda item: f", {item}"):
        passed.append(item)
        clock[0] += 6.0
    lines = console.file.getvalue().splitlines()
    assert passed == list("abcd")
    assert lines == ["1 of 5 before", "3 of 5, b"] + (["5 of 5, d"] if last_line else [])


def test_nothing_is_printed_of_a_short_piece_of_work(clock):
    console = plain()
    assert list(track("ab", console, WORDING, done=0, total=2)) == ["a", "b"]
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    assert list(track("ab", console, WORDING, done=1, total=3, speed=lambda item: "7 items/s")) == ["a", "b"]
    shown = console.file.getvalue()
    assert "counting" in shown and "3/3" in shown and "7 items/s" in shown and "before" not in shown


def test_bytes_read_are_told_in_mebibytes(clock, capsys):
    with bytes_read(5 << 20) as show:
        show(1 << 20)
        clock[0] += 11.0
        show(3 << 20)
    assert capsys.readouterr().err == "read 3 of 5 MiB\n"
