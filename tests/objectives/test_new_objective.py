"""A new objective is one class in one file: this one is added here, in full, and trains at several parallel layouts."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.objectives.objective import Decision, Objective
from megatron_ssft.objectives.sets import TrainingSets
from megatron_ssft.parallel.loss_terms import LossTerm
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.records import Assignment
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, assemble, make_rows, weight_shards, write_rows


class ShorterFirst(Objective[SSFTConfig, Decision]):
    """Every trace under the tag of its rank by length; long traces weigh less. Reports the mean NLL by itself."""

    def __init__(self, config, vocabulary, topology):
        super().__init__(config, vocabulary, topology)
        self.sets = TrainingSets(config, vocabulary, topology)

    def decide(self, step):
        batch = self.sets.next_batch()
        ranks = [np.argsort(np.argsort([len(c) for c in s.completion_ids], kind="stable")) for s in batch.sets]
        assignments = [Assignment(tuple(int(rank) for rank in of)) for of in ranks]
        planned = step.planner.plan_sequences(batch, assignments, self.vocabulary.tags)
        tokens = sum(s.num_scored for s in planned.plan.sequences)

        def prepare(microbatch, model_input):
            of_sequence = np.array([1.0 / max(s.num_scored, 1) for s in microbatch.sequences], dtype=np.float32)
            return model_input, (of_sequence[model_input.owner] / np.float32(batch.num_traces),)

        def loss(nll, weights):
            return (nll * weights).sum(), nll.detach().double().sum()[None]

        return Decision(
            terms=[LossTerm(planned, prepare, loss, ("nll",))],
            figures=lambda sums: {"mean_nll": sums["nll"] / tokens},
            questions=len(batch.sets),
        )


def train_and_tell(values):
    """Rows of the log and weight shards. Runs on every rank."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run), ShorterFirst)
    rows = [trainer.train_step()[1] for _ in range(config.run.training.train_iters)]
    shards = weight_shards(trainer.engine)
    destroy_topology()
    return {"rows": rows, "shards": shards}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_objective")
    paths = {"data_path": [write_rows(folder / "train.jsonl", make_rows())], "data_cache_path": str(folder / "cache")}
    return BASE | paths | {"train_iters": 3}


def test_it_takes_at_most_forty_lines():
    assert len(inspect.getsource(ShorterFirst).splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_it_trains_alike_at_every_parallel_layout(values, flag):
    (alone,) = run_ranks(1, train_and_tell, values)
    spread = run_ranks(2, train_and_tell, values | {flag: 2})
    for a, b in zip(alone["rows"], spread[0]["rows"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["mean_nll"] == pytest.approx(a["mean_nll"], rel=1e-5)
    assert alone["rows"][-1]["loss"] < alone["rows"][0]["loss"] + 1.0
    ours, theirs = assemble([alone]), assemble(spread)
    for name, weight in ours.items():
        np.testing.assert_allclose(theirs[name], weight, atol=1e-4, err_msg=name)
