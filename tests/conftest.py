"""Settings of all tests."""

from __future__ import annotations

import pytest

# Before the first test imports them: their asserts tell values, like those of a test file.
pytest.register_assert_rewrite("tests.helpers")
