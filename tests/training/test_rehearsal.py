"""A simulated step is the real one: counters around real tensors and around simulated ones give the same."""

from __future__ import annotations

import pytest

from megatron_ssft.parallel.simulated.records import PARTS
from megatron_ssft.scheduling.accounting import FlopAccountant
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.training.rehearsal import simulate_run
from tests.helpers.distributed import run_ranks
from tests.helpers.simulated_steps import VALUES, config_of, count_real, simulate_ranks, write_policy, write_sets

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, VPP = TP2 | {"sequence_parallel": True}, PP2 | {"num_layers_per_virtual_pipeline_stage": 1, "num_layers": 4}
DIST, FULL, BF16 = {"use_distributed_optimizer": True}, {"recompute_granularity": "full"}, {"bf16": True}
PADDED = {"sequence_layout": "padded", "micro_batch_size": 2}
UNTIED = {"untie_embeddings_and_output_weights": True}
SMALL = {"num_layers": 2, "global_batch_size": 8}
CHANCE = {"matching": "random", "log_matching_interval": 1}
"""Costs are evaluated, but do not decide: those of a simulated run are made up, and plans depend on the assignment."""
GFPO = {"objective": "gfpo-exact", "anchor": "kl", "anchor_completions": 6}
GRPO = {"objective": "grpo", "anchor": "none"}
REAL = {
    "packed": (1, {}),
    "packed, bf16": (1, BF16),
    "padded": (1, PADDED),
    "concatenated, untied": (1, {"sequence_layout": "concatenated"} | UNTIED),
    "recompute": (1, FULL),
    "tensor": (2, TP2 | UNTIED),
    "sequence": (2, SP | BF16),
    "pipeline": (2, PP2 | PADDED),
    "interleaved": (2, VPP),
    "distributed optimizer": (2, DIST | BF16),
    "all of it": (4, SP | PP2 | BF16 | FULL | DIST),
    "gfpo": (2, GFPO | PP2),
    "gfpo, stages and tensors": (4, GFPO | PP2 | SP | BF16),
    "gfpo, distributed optimizer": (2, GFPO | DIST | BF16),
    "grpo": (2, GRPO | TP2),
    "grpo, stages and tensors": (4, GRPO | PP2 | TP2),
    "grpo, replicas": (2, GRPO | BF16),
}


def values_of(folder):
    """Values of every run, by name."""
    policy = write_policy(folder) | {"num_layers": 2}
    ssft = VALUES | write_sets(folder) | CHANCE | SMALL
    runs = {name: (policy if "objective" in changes else ssft) | changes for name, (_, changes) in REAL.items()}
    for values in runs.values():
        if values.get("sequence_layout") != "padded":
            values["attention_backend"] = "sdpa"
    return runs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """{name: [(step around real tensors, step around simulated ones)]} of the first and the last rank."""
    runs, real, places = values_of(tmp_path_factory.mktemp("runs")), {}, []
    for world_size in sorted({ranks for ranks, _ in REAL.values()}):
        names = [name for name in REAL if REAL[name][0] == world_size]
        counted = run_ranks(world_size, count_real, [runs[name] for name in names], timeout=300)
        for rank in sorted({0, world_size - 1}):
            real |= {(name, rank): step for name, step in zip(names, counted[rank])}
            places += [(name, world_size, rank) for name in names]
    arguments = [(runs[name], world_size, rank) for name, world_size, rank in places]
    (simulated,) = run_ranks(1, simulate_ranks, arguments, "cpu", timeout=900)
    pairs = {name: [] for name in REAL}
    for (name, _, rank), step in zip(places, simulated):
        pairs[name].append((real[name, rank], step))
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_memory_is_that_of_real_tensors(both, name):
    for real, simulated in both[name]:
        assert simulated.rank == real.rank
        assert simulated.parameters == real.parameters
        assert simulated.peak == pytest.approx(real.peak, rel=0.01)
        assert simulated.between_steps == pytest.approx(real.between_steps, rel=0.01)
        for a, b in zip(real.sections, simulated.sections, strict=True):
            assert (a.name, b.memory.peak) == (b.name, pytest.approx(a.memory.peak, rel=0.01))
            parts, near = by_part(b), pytest.approx(by_part(a), rel=0.02, abs=0.005 * a.memory.peak)
            assert parts == near


def by_part(section):
    """Bytes at the peak by part. Around real tensors nothing tells the inputs from what is computed of them."""
    parts = dict.fromkeys(PARTS, 0) | section.memory.peak_parts
    parts["activations"] += parts.pop("other")
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_work_and_messages_are_those_of_real_tensors(both, name):
    for real, simulated in both[name]:
        for a, b in zip(real.sections, simulated.sections, strict=True):
            assert a.flops == b.flops
            assert a.collectives == b.collectives
        assert real.section("training").flops.backward > 0
        assert real.world_size == 1 or real.section("training").collectives


def sections_and_plans(values):
    """(forward, backward, recomputed FLOPs of all ranks, those of the accountant without and with padding), of scoring
    and of training."""
    config = config_of(values)
    plans, world_size = [], values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"] * 2
    planned = Planner.plan_sequences, Planner.plan_costs

    def noting(plan):
        def noted(self, *args, **kwargs):
            plans.append((FlopAccountant(self.flops), plan(self, *args, **kwargs)))
            return plans[-1][1]

        return noted

    Planner.plan_sequences, Planner.plan_costs = map(noting, planned)
    steps = [simulate_run(config, world_size, rank) for rank in range(world_size)]
    (accountant, costs), (_, train) = plans[-2:]
    told = []
    padded = [accountant.work.of(planned.plan.size) for planned in (costs, train)]
    for name, expected in (
        ("scoring", (accountant.forward(costs.plan), padded[0])),
        ("training", (accountant.training(train.plan), 3 * padded[1])),
    ):
        flops = [step.section(name).flops for step in steps]
        sums = (sum(getattr(each, kind) for each in flops) for kind in ("forward", "backward", "recomputed"))
        told.append((*sums, *expected))
    return told


EXACT = {
    "bf16": True,
    "vocab_size": 270,  # nothing is padded: neither the vocabulary nor, for one rank per sequence, the streams
    "untie_embeddings_and_output_weights": True,  # tags of a tied head are computed twice
    "pipeline_model_parallel_size": 2,
    "tensor_model_parallel_size": 2,
    "use_distributed_optimizer": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, FULL, {"sequence_layout": "padded"}], ids=["packed", "recompute", "padded"])
def test_flops_are_the_accountants(tmp_path, changes):
    values = VALUES | write_sets(tmp_path) | {"num_layers": 2} | EXACT | changes
    (scoring, training) = run_ranks(1, sections_and_plans, values, timeout=300)[0]
    # The accountant leaves out what fills rows up, which is computed all the same.
    forward, backward, recomputed, expected, with_padding = scoring
    assert (forward, backward, recomputed) == (with_padding, 0, 0)
    assert (expected == with_padding) == ("sequence_layout" not in changes)
    forward, backward, recomputed, expected, _ = training
    assert (forward + backward, backward) == (expected, 2 * forward)
    assert recomputed == forward if changes == FULL else 0 < recomputed < 0.2 * forward
