"""Fixtures of the online loop's tests."""

from __future__ import annotations

import importlib.util

import pytest

from tests.helpers.online_loop import ROOT, Place


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
    """tools/run_gfpo.py as a module."""
    spec = importlib.util.spec_from_file_location("run_gfpo", ROOT / "tools" / "run_gfpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
