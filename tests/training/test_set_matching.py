"""Approximations of the matching: what they reuse or leave out, what they say they lose, and that exact means exact."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.matching.approximation import assignment_regret, is_certain, known_cost
from megatron_ssft.matching.assignment import solve_assignment
from megatron_ssft.objectives.set_matching import Matched
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, make_rows, write_rows

FIRST = {"matching_first_tokens": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set_matching")
    rows = make_rows(count=12)
    return {"data_path": [write_rows(folder / "train.jsonl", rows)], "data_cache_path": str(folder / "cache")}


def steps_of(values):
    """Rows of the log, and (id, epoch, tags, exact costs, costs of the first tokens, lengths) of every visit."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    rows, visits = [], []
    for _ in range(config.run.training.train_iters):
        objective, step = trainer.objective, trainer.context()
        before = objective.sets.queue.state_dict()
        batch = objective.sets.next_batch()
        exact = objective.matching.costs(step, batch, Matched([]))
        first = objective.matching.costs(step, batch, Matched([]), 2)
        objective.sets.queue.load_state_dict(before)
        decision, row = trainer.train_step()
        rows.append(row)
        for visit, tokenized, a, cost, early in zip(batch.visits, batch.sets, decision.assignments, exact, first):
            lengths = [len(c) for c in tokenized.completion_ids]
            visits.append((tokenized.id, visit.epoch, a.tags, cost, early, lengths, a.cost_NM is not None))
    destroy_topology()
    return rows, visits


def train(data, overrides, ranks=1):
    values = BASE | data | {"train_iters": 10} | overrides
    if {"matching_interval", "matching_first_tokens"} & set(overrides):
        values["regret_interval"] = 4
    return run_ranks(ranks, steps_of, values)


def test_an_assignment_is_reused_for_the_epochs_asked_for(data):
    ((rows, visits),) = train(data, {"matching_interval": 2})
    made = {}
    for id_, epoch, tags, cost, *_ in visits:
        if id_ in made and epoch - made[id_][0] < 2:
            assert tags == made[id_][1]
        else:
            assert assignment_regret(cost, tags) == pytest.approx(0, abs=1e-6)
            made[id_] = (epoch, tags)
    assert max(epoch for _, epoch, *_ in visits) >= 2
    reused = [row["matching_reused"] for row in rows]
    assert reused[0] == 0 and max(reused) > 0
    assert sum(reused) == len(visits) - sum(r["questions"] - r["matching_reused"] for r in rows)
    for row in rows:
        assert (row["matching_flops"] == 0) == (row["matching_reused"] == row["questions"])


def test_regret_is_measured_against_the_exact_costs(data):
    ((rows, visits),) = train(data, {"matching_interval": 3})
    measured = [row for row in rows if "matching_regret" in row]
    windows = [(row["iteration"] - 1) // 4 for row in measured]
    assert len(set(windows)) == len(windows) and {0, 1} <= set(windows)
    done = 0
    for row in rows:
        mine = visits[done : done + row["questions"]]
        done += row["questions"]
        assert all(has_cost == ("matching_regret" in row) for *_, has_cost in mine)
        if "matching_regret" in row:
            regrets = [assignment_regret(cost, tags) for _, _, tags, cost, *_ in mine]
            assert row["matching_regret"] == pytest.approx(np.mean(regrets), abs=1e-5)
            assert row["exact_matching_seconds"] > 0
    assert any(row["matching_reused"] and row["matching_regret"] > 0 for row in measured)


@pytest.mark.parametrize(("certainty", "share"), [(1e-9, 1.0), (1e6, 0.0), (0.005, None)])
def test_first_tokens_decide_where_they_can(data, certainty, share):
    every = 30  # much more than the shortest traces have, so that first means and their share in the cost differ
    overrides = {"matching_certainty": certainty, "matching_tokens": every, "lr": 3e-2}
    ((rows, visits),) = train(data, FIRST | overrides)
    certain = 0
    for _, _, tags, cost, early, lengths, _ in visits:
        if is_certain(early, lengths, 2, every, certainty):
            certain += 1
            assert assignment_regret(known_cost(early, lengths, 2, every), tags) == pytest.approx(0, abs=1e-6)
        else:
            assert assignment_regret(cost, tags) == pytest.approx(0, abs=1e-6)
    assert sum(row["matching_certain"] for row in rows) == certain
    if share == 0.0:
        short = sum(max(lengths) <= 2 for *_, lengths, _ in visits)
        assert certain == short
    elif share == 1.0:
        assert certain > 0.9 * len(visits)
    else:
        assert 0.05 * len(visits) < certain < 0.95 * len(visits)


def test_the_same_on_every_rank(data):
    both = FIRST | {"matching_certainty": 0.05, "matching_interval": 2, "global_batch_size": 12}
    results = train(data, both, ranks=2)
    assert [v[:3] for v in results[0][1]] == [v[:3] for v in results[1][1]]
    ((_, alone),) = train(data, both)
    same = [a[2] == b[2] for a, b in zip(alone, results[0][1])]
    assert np.mean(same) > 0.9  # rounding decides a few


def test_low_precision_costs_are_close(data):
    """And really computed otherwise; training is untouched."""
    ((_, exact),) = train(data, {"train_iters": 1})
    ((_, rough),) = train(data, {"train_iters": 1, "matching_precision": "bf16"})
    for a, b in zip(exact, rough):
        assert not np.array_equal(a[3], b[3])
        np.testing.assert_allclose(a[3], b[3], rtol=2e-2)
        assert solve_assignment(a[3], seed=0)
