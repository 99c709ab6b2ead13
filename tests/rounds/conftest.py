"""Fixtures of the online loop's tests."""

from __future__ import annotations

import pytest

from megatron_ssft.cli import gfpo_rounds
from tests.helpers.online_loop import Place


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
    made.kill_left_behind()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted loop makes."""
    made = Place(tmp_path_factory.mktemp("whole") / "place")
    status, out, err = made.run()
    assert status == 0, err
    return made, out


@pytest.fixture
def program():
    """The command as a module."""
    return gfpo_rounds
