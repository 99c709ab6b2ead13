"""Names, figures and curves as the report writes them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.report.exhibits import (
    clean,
    join,
    number,
    short_names,
    slugs,
    thin,
)


def test_names_from_the_data_are_harmless_and_short():
    assert clean("a\x00b\u202ec\ud800\nd\te") == "a\ufffdb\ufffdc\ufffd d e"
    assert clean("x" * 1000, 10) == "x" * 9 + "…" and len(clean("é" * 81)) == 80
    assert clean("<b>&\"'") == "<b>&\"'"  # escaping is the page's business
    long = [f"teacher-{k}-with-a-very-long-name" for k in range(3)]
    short = short_names([*long, "a", "a"], 10)
    assert len(set(short)) == 5 and all(len(name) <= 13 for name in short)
    assert slugs(["a", "../../etc", "A", "b c", "7", "run-1"]) == {
        "a": "1", "../../etc": "2", "A": "3", "b c": "4", "7": "5", "run-1": "run-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (float("inf"), "-"), (0, "0"), (3.14159, "3.14"), (0.05, "0.0500"),
     (0.005, "0.005"), (2e-7, "2.00e-07"), (12345.6, "12,346"), (5.0, "5"), (-0.5, "-0.500"), (3e9, "3.00e+09")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_joined_and_thinned():
    assert [join(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    x, y, run = thin(np.arange(10.0), np.array([1, np.nan, 3, 5, 7, 9, 11, 13, 15, np.inf]), most=3)
    assert run == 3 and y.tolist() == [3, 9, 14] and x.tolist() == pytest.approx([5 / 3, 5, 7.5])
    assert thin(np.arange(3.0), np.arange(3.0))[2] == 1
