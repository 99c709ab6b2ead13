"""Run statistics against values computed by hand, and damaged logs."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.assignments import load_assignments
from megatron_ssft.formats.metrics import load_metrics
from megatron_ssft.formats.run_logs import load_run
from megatron_ssft.matching.statistics import (
    configuration,
    configuration_counts,
    distinct_configurations,
    mutual_information_bits,
    tag_source_counts,
    whole_epochs,
)
from megatron_ssft.report.read.runs import final_mean, gap_by_iteration
from tests.helpers.report_data import (
    visit_row,
    write_run,
)


@pytest.fixture
def small(tmp_path):
    """Two epochs of three visits and a begun third one; all numbers in the tests below are counted by hand."""
    visits = [
        visit_row(0, [0, 1], ["a", "b"], [[0.5, 2.0], [1.0, 1.0], [3.0, 3.0]]),
        visit_row(0, [1, 0], ["b", "a"]),  # the same edges, traces in another order
        visit_row(0, [1, 0], ["a", "b"]),
        visit_row(1, [0, 2], ["a", "b"]),
        visit_row(1, [0, 2], ["a", "b"]),
        visit_row(1, [2, 0], ["b", "a"]),
        visit_row(2, [1, 2], [None, "b"]),
    ]
    metrics = [
        {"iteration": 1, "loss": 2.0, "matching_gap": None, "seconds": 3, "note": "text"},
        {"iteration": 2, "loss": 1.0, "matching_gap": 0.5, "seconds": 1},
        {"iteration": 3, "matching_gap": 1.5, "seconds": 1, "new_key": 7},
    ]
    return write_run(tmp_path / "run", metrics, visits)


def test_metrics_by_columns(small):
    metrics = load_metrics(small)
    assert len(metrics) == 3
    np.testing.assert_array_equal(metrics["iteration"], [1, 2, 3])
    np.testing.assert_array_equal(metrics["loss"], [2, 1, np.nan])
    np.testing.assert_array_equal(metrics["new_key"], [np.nan, np.nan, 7])
    np.testing.assert_array_equal(metrics["never_written"], [np.nan] * 3)
    assert "note" not in metrics.columns
    iterations, gaps = gap_by_iteration(metrics)
    assert iterations.tolist() == [2, 3] and gaps.tolist() == [0.5, 1.5]


def test_final_mean_takes_the_last_values_there_are():
    assert final_mean(np.array([9.0, np.nan, 1.0, 2.0, np.nan]), last=2) == 1.5
    assert final_mean(np.array([4.0, 2.0])) == 3.0
    assert math.isnan(final_mean(np.array([np.nan])))


def test_configurations(small):
    visits = load_assignments(small)
    assert configuration(visits[0]) == configuration(visits[1]) == ((0, "a"), (1, "b"))
    assert configuration(visits[6]) == ((1, "trace 1"), (2, "b"))
    assert distinct_configurations(visits) == {0: 2, 1: 1, 2: 1}
    assert configuration_counts(visits)[0] == {((0, "a"), (1, "b")): 2, ((0, "b"), (1, "a")): 1}
    assert whole_epochs(visits) == [0, 1]
    assert visits[0].cost_NM.shape == (3, 2) and visits[0].cost_NM.dtype == np.float64
    assert visits[1].cost_NM is None
    assert load_run(small).num_tags == 3 and load_run(small).name == "run"


def test_tag_source_counts(small):
    counts, names = tag_source_counts(load_assignments(small), epoch=0, num_tags=4)
    assert names == ("a", "b", "trace 1")
    assert counts.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_mutual_information():
    assert mutual_information_bits(np.diag([5, 5, 5, 5])) == pytest.approx(2.0)
    assert mutual_information_bits(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-12)
    # p = [[3/8, 1/8], [1/8, 3/8]], both margins 1/2: 2 * 3/8 * log2(3/2) + 2 * 1/8 * log2(1/2)
    assert mutual_information_bits(np.array([[3, 1], [1, 3]])) == pytest.approx(0.75 * math.log2(1.5) - 0.25)
    # deterministic from row to column, uneven: the entropy of the margin (1/4, 3/4)
    assert mutual_information_bits(np.array([[1, 0], [0, 3]])) == pytest.approx(2 - 0.75 * math.log2(3))
    assert math.isnan(mutual_information_bits(np.zeros((2, 2), int)))


def test_a_torn_last_line_is_ignored_with_a_note(small, caplog):
    path = small / "metrics.jsonl"
    whole = path.read_bytes()
    last = '{"iteration": 4, "loss": "é"}'.encode()
    for cut in range(1, len(last)):
        path.write_bytes(whole + last[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(load_metrics(small)) == 3
        assert f"{path}:4:" in caplog.text
    path.write_bytes(whole + last)  # complete but for its line end
    assert len(load_metrics(small)) == 4


GOOD_VISIT = visit_row(0, [0, 1], ["a", "b"], [[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", '{"iteration": 1'),
        ("metrics.jsonl", "[1, 2]"),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"loss": 1.0}'),
        ("metrics.jsonl", '{"iteration": true}'),
        ("assignments.jsonl", "null"),
        *(
            ("assignments.jsonl", json.dumps({**GOOD_VISIT, **change}))
            for change in (
                {"tags": [0, -1]},
                {"tags": []},
                {"tags": None},
                {"tags": [0, 1.5]},
                {"sources": ["a"]},
                {"sources": ["a", 3]},
                {"epoch": None},
                {"id": 5},
                {"cost": [[0.0, 1.0]]},
                {"cost": [[0.0], [1.0]]},
                {"cost": 3.0},
            )
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, file, line):
    good = json.dumps({**GOOD_VISIT, "loss": 1.0})
    (tmp_path / file).write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError) as error:
        load_metrics(tmp_path) if file == "metrics.jsonl" else load_assignments(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}:2: ") and "\n" not in str(error.value)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: cannot read the run"):
        load_run(tmp_path)
