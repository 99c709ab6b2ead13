"""Models and inputs of policy learning, made once per test file."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.policy_runs import write_inputs, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models of every kind, as runs."""
    folder = tmp_path_factory.mktemp("models")
    run_ranks(1, write_models, str(folder))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Questions, completions, scores and rewards."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
