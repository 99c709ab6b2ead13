"""The time model, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ssft.booking.step_time import LINK_SHARE, AverageStep, ring_bytes, step_time, with_gathered_weights
from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import build_config
from megatron_ssft.config.gpus import GPUS
from megatron_ssft.parallel.simulated.records import Collective, SimulatedStep
from tests.helpers.bookings import section
from tests.helpers.simulated_steps import VALUES

GPU = GPUS["H200"]
ASKED = DryRun(world_size=16, gpu="H200", attainable_share=0.4)
AVERAGE = AverageStep(
    matching_flops=1e14,
    training_flops=5e14,
    waiting_flops=2e14,
    matching_idle=0.0,
    training_idle=0.0,
    matching_ratio=1.0,
    training_ratio=1.0,
    last_microbatch=0.1,
    model_flops=5e15,
    method_flops=6e15,
    tokens=1e5,
)
GIGA = 10**9


def config(**changes):
    return build_config(VALUES | {"data_path": ["made up"], "bf16": True} | changes, SSFTConfig).run


def step(*messages, name="training"):
    return SimulatedStep(0, 16, 10**9, 0, "varlen", (section(name, messages),))


def message(kind, group, ranks, size, between=False):
    return Collective(kind, group, ranks, between, 1, size)


def test_kernels_take_flops_over_the_attained_speed():
    time = step_time(AVERAGE, [step()], config(), ASKED)
    speed = 989e12 * 0.4
    assert (time.matching, time.training, time.waiting) == pytest.approx((1e14 / speed, 5e14 / speed, 2e14 / speed))
    assert (time.tensor, time.pipeline, time.data) == (0, 0, 0)
    assert time.total == pytest.approx(8e14 / speed + time.optimizer)
    faster = step_time(AVERAGE, [step()], config(), ASKED, times=1.25)
    assert faster.training == pytest.approx(time.training / 1.25) and faster.optimizer == time.optimizer


def test_a_ring_sends_all_but_its_own_part():
    for ranks in (2, 8):
        share = (ranks - 1) / ranks
        assert ring_bytes(message("all_gather", "tensor", ranks, 100)) == pytest.approx(100 * share)
        assert ring_bytes(message("reduce_scatter", "tensor", ranks, 100)) == pytest.approx(100 * share)
        assert ring_bytes(message("all_reduce", "tensor", ranks, 100)) == pytest.approx(200 * share)
        assert ring_bytes(message("send", "pipeline", ranks, 100)) == 100


def test_messages_go_over_the_link_or_the_network():
    inside = step(message("all_gather", "tensor", 2, 90 * GIGA))
    between = step(message("all_gather", "tensor", 2, 90 * GIGA, between=True))
    assert step_time(AVERAGE, [inside], config(), ASKED).tensor == pytest.approx(45 / (GPU.link * LINK_SHARE))
    assert step_time(AVERAGE, [between], config(), ASKED).tensor == pytest.approx(45 / (GPU.network * LINK_SHARE))
    slow = dataclasses.replace(ASKED, network_gbit=100)
    assert step_time(AVERAGE, [between], config(), slow).tensor == pytest.approx(45 / (12.5 * LINK_SHARE))


def test_messages_follow_the_tokens_and_wait_with_the_stages():
    shorter = dataclasses.replace(AVERAGE, training_ratio=0.5, training_idle=0.2)
    steps = [step(message("all_gather", "tensor", 2, 90 * GIGA), message("send", "pipeline", 4, GIGA))]
    whole, half = (step_time(average, steps, config(), ASKED) for average in (AVERAGE, shorter))
    assert half.tensor == pytest.approx(whole.tensor * 0.5 / 0.8)
    assert half.pipeline == pytest.approx(whole.pipeline * 0.5 / 0.8)


def test_the_slowest_stage_counts():
    steps = [step(message("all_gather", "tensor", 2, size * GIGA)) for size in (10, 90, 30)]
    assert step_time(AVERAGE, steps, config(), ASKED) == step_time(AVERAGE, steps[1:2], config(), ASKED)


def test_gradients_hide_behind_the_last_backward_pass():
    steps = [step(message("reduce_scatter", "data", 4, 40 * GIGA, True), message("all_gather", "data", 4, 20 * GIGA))]
    reduced, gathered = 30 / (GPU.network * LINK_SHARE), 15 / (GPU.link * LINK_SHARE)
    plain = step_time(AVERAGE, steps, config(), ASKED)
    assert plain.data == pytest.approx(reduced + gathered)
    hidden = step_time(AVERAGE, steps, config(overlap_grad_reduce=True), ASKED)
    assert hidden.data == pytest.approx(reduced + gathered - 0.1 * 5e14 / (989e12 * 0.4))
    long = dataclasses.replace(AVERAGE, training_flops=1e18)
    assert step_time(long, steps, config(overlap_grad_reduce=True), ASKED).data == pytest.approx(gathered)


def test_by_default_weights_are_gathered_behind_the_first_forward_pass_too():
    steps = [step(message("reduce_scatter", "data", 4, 40 * GIGA, True), message("all_gather", "data", 4, 20 * GIGA))]
    reduced, gathered = 30 / (GPU.network * LINK_SHARE), 15 / (GPU.link * LINK_SHARE)
    on, behind = config(use_distributed_optimizer=True), 0.01 * 5e14 / (989e12 * 0.4)
    little = dataclasses.replace(AVERAGE, last_microbatch=0.01)
    assert step_time(little, steps, on, ASKED).data == pytest.approx(reduced + gathered - 1.5 * behind)
    off = config(use_distributed_optimizer=True, overlap_grad_reduce=False)
    assert step_time(little, steps, off, ASKED).data == pytest.approx(reduced + gathered)
    assert step_time(dataclasses.replace(little, training_flops=1e18), steps, on, ASKED).data == 0


def test_weights_that_are_gathered_in_the_next_step_count_in_this_one():
    reduced = message("reduce_scatter", "data", 4, 40 * GIGA, True)
    (section_,) = with_gathered_weights(step(reduced)).sections
    assert section_.collectives == (reduced, message("all_gather", "data", 4, 20 * GIGA, True))
    complete = step(reduced, message("all_gather", "data", 4, 20 * GIGA, True))
    assert with_gathered_weights(complete) is complete
    alone = step(message("all_reduce", "data", 4, 40 * GIGA))
    assert with_gathered_weights(alone) is alone


def test_the_optimizer_moves_its_state_once():
    whole = step_time(AVERAGE, [step()], config(), ASKED)
    assert whole.optimizer == pytest.approx(34e9 / 4.8e12)
    shared = step_time(AVERAGE, [step()], config(use_distributed_optimizer=True), ASKED)
    assert shared.optimizer == pytest.approx(whole.optimizer / 16)


def test_scoring_has_messages_of_its_own():
    steps = [step(message("all_gather", "tensor", 2, 90 * GIGA), name="scoring")]
    halved = dataclasses.replace(AVERAGE, matching_ratio=0.5)
    assert step_time(halved, steps, config(), ASKED).tensor == pytest.approx(22.5 / (GPU.link * LINK_SHARE))
