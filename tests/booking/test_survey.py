"""Which step is the heaviest, and what an average one takes, against all steps planned one by one."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.booking import survey as surveys
from megatron_ssft.booking.survey import cut_epoch, held, survey
from megatron_ssft.config.flags import with_values
from megatron_ssft.matching.assignment import Matcher
from megatron_ssft.objectives.sets import make_batch
from megatron_ssft.scheduling.pipeline_time import pipeline_time
from megatron_ssft.scheduling.planner import Planner
from tests.helpers.bookings import prepared

QUESTIONS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("run"), QUESTIONS)


def all_plans(config, dataset, vocabulary, epoch, dp_size):
    """The training plan of every step."""
    planner = Planner(config.run, vocabulary.size, dp_size, config.cost_tokens_per_microbatch)
    matcher = Matcher("random", vocabulary.tags.num_tags, config.run.training.seed)
    for visits in epoch.visits:
        batch = make_batch(dataset, visits)
        assignments = matcher.assign(batch, [None] * len(batch.sets))
        yield planner.plan_sequences(batch, assignments, vocabulary.tags).plan


def test_lengths_are_those_of_the_data(run):
    _, dataset, _ = run
    longest, tokens = dataset.sequence_tokens()
    for place in range(len(dataset)):
        example = dataset[place]
        lengths = [len(example.prompt_ids) + len(ids) for ids in example.completion_ids]
        assert (longest[place], tokens[place]) == (max(lengths), sum(lengths))


def test_an_epoch_holds_every_question_once(run):
    config, dataset, _ = run
    epoch = cut_epoch(config, dataset)
    visits = [visit.index for step in epoch.visits for visit in step]
    assert sorted(visits) == list(range(QUESTIONS))
    assert epoch.steps == config.run.training.train_iters
    assert epoch.tokens.sum() == dataset.sequence_tokens()[1].sum()
    by_epochs = with_values(config, {"train_iters": None, "train_epochs": 5})
    assert cut_epoch(by_epochs, dataset).steps == 5 * len(epoch.visits)


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("stages", [1, 2])
def test_the_heaviest_step_is_found(run, recompute, dp_size, stages):
    config, dataset, vocabulary = run
    config = with_values(config, {"recompute_granularity": recompute, "pipeline_model_parallel_size": stages})
    epoch = cut_epoch(config, dataset)
    found = survey(config, dataset, vocabulary, epoch, dp_size)
    plans = list(all_plans(config, dataset, vocabulary, epoch, dp_size))
    most = max(held(config.run, of_rank) for plan in plans for of_rank in plan.ranks)
    assert held(config.run, found.heaviest.training.ranks[found.heaviest_rank]) == most
    assert found.heaviest.training == plans[found.heaviest.number]


def test_what_a_rank_holds_by_hand(run):
    config, *_ = run
    model = config.run.model
    (plan, *_) = all_plans(*run, cut_epoch(*run[:2]), 2)
    of_rank = plan.ranks[0]
    tokens = [microbatch.size.tokens for microbatch in of_rank]
    whole = 18 * model.hidden_size + 6 * model.ffn_hidden_size
    assert held(config.run, of_rank) == model.num_layers * whole * max(tokens)
    two = with_values(config, {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"}).run
    pairs = [sum(tokens[i : i + 2]) for i in range(len(tokens))]
    assert held(two, of_rank) == model.num_layers // 2 * 2 * model.hidden_size * max(pairs) + whole * max(tokens)


def test_a_sample_stands_for_all(run, monkeypatch):
    monkeypatch.setattr(surveys, "SAMPLED", 5)
    config, dataset, vocabulary = run
    epoch = cut_epoch(config, dataset)
    found = survey(config, dataset, vocabulary, epoch, 2)
    numbers = [step.number for step in found.sampled]
    assert len(numbers) == 5 and numbers[0] == 0 and numbers[-1] == len(epoch.visits) - 1
    assert np.ptp(np.diff(numbers)) <= 1
    assert all(step.costs is not None for step in found.sampled)
    single = survey(with_values(config, {"matching": "random"}), dataset, vocabulary, epoch, 2)
    assert all(step.costs is None for step in single.sampled)


def test_the_slowest_rank_decides(run):
    config, dataset, vocabulary = run
    config = with_values(config, {"pipeline_model_parallel_size": 2})
    found = survey(config, dataset, vocabulary, cut_epoch(config, dataset), 3)
    plan = found.heaviest.training
    times = [pipeline_time([found.work.of(mb.size) for mb in of_rank], 2, 1, 3.0) for of_rank in plan.ranks]
    assert found.slowest(plan, 3.0) == max(times)
