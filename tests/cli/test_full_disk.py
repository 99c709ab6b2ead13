"""A full disk is said as such, wherever it is met, and what was saved before stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import reason_of


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT"])
def test_the_reason_is_the_same_everywhere(name):
    import errno

    number = getattr(errno, name)
    said = "the disk is full" if name == "ENOSPC" else "the disk quota is used up"
    assert reason_of(OSError(number, os.strerror(number))) == said
    assert reason_of(OSError(errno.EACCES, "Permission denied")) == "Permission denied"
    assert reason_of(OSError("odd")) == "odd"


def test_a_line_that_finds_no_room_is_no_traceback(capsys):
    def write():
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("a line")
            file.flush()

    assert run_command(write) == 2
    assert capsys.readouterr().err.strip().endswith("cannot be written: the disk is full; make room and start again")
    with pytest.raises(FileNotFoundError):  # anything else is a bug, or somebody else's to say
        run_command(lambda: Path("/no/such/file").unlink())
