"""Costs and shares of matchings against values computed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ssft.records import Assignment
from megatron_ssft.report.read.run_facts import configuration_shares, load_facts
from tests.helpers.report_data import (
    make_run,
)


def test_random_costs_use_every_assignment_alike(tmp_path):
    """Uniform over the assignments: each of 3 tags serves the only trace a third of the time."""
    make_run(tmp_path / "run", sources=["a"], tags=3, questions=300, epochs=2, per_step=600)
    (facts,) = load_facts([tmp_path / "run"])
    # costs: epoch 0 always 1; epoch 1: 1 under tag 0, else 3; both epochs in one step of 600
    assert facts.costs.random[0] == pytest.approx((1 + (1 + 3 + 3) / 3) / 2, abs=0.07)


def test_shares_of_configurations_by_hand(tmp_path):
    folder = make_run(tmp_path / "run", questions=100, epochs=2, per_step=50)
    rows = [json.loads(line) for line in (folder / "assignments.jsonl").read_text().splitlines()]
    for row in rows[50:75]:  # a quarter of the second of four stretches of 50
        row["tags"] = [5, 4, 3, 2]
    (folder / "assignments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (facts,) = load_facts([folder])
    shares = configuration_shares(facts.run, least_visits=50)
    assert shares.shares.tolist() == [[1.0, 0.5, 1.0, 1.0], [0.0, 0.5, 0.0, 0.0]]
    assert shares.edges == pytest.approx([1, 2, 3, 4, 5], abs=1e-4) and shares.covered == 1.0
    assert configuration_shares(facts.run, least_visits=150) is None


def test_assignment_type_is_what_the_costs_are_solved_for(tmp_path):
    """The chosen cost is the one the trainer itself would log."""
    make_run(tmp_path / "run", matching="random")
    (facts,) = load_facts([tmp_path / "run"])
    first = [v for v in facts.run.visits if v.iteration == 12]
    mean = np.mean([Assignment(v.tags, v.cost_NM).cost for v in first])
    assert facts.costs.chosen[-1] == pytest.approx(mean)
