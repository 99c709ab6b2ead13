"""The same answers for policy learning, by its first step: its steps are much alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_ssft.booking.book import hardware_answers, layout_of, messages_of, simulated_seconds
from megatron_ssft.booking.memory import stage_memory
from megatron_ssft.booking.records import Booking
from megatron_ssft.booking.simulations import Job, run_all, simulated_stages
from megatron_ssft.booking.step_time import AverageStep
from megatron_ssft.booking.traps import layout_traps, room_traps
from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.parallel.checkpoint.checkpoint_size import estimate_size
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.topology import check_world_size
from megatron_ssft.tokenizers.vocabulary import Vocabulary


def book_policy(config: GFPOConfig, world_size: int, asked: DryRun, vocabulary: Vocabulary) -> Booking:
    """Simulate the first step. With pipeline stages there is no time: how long they wait is not planned beforehand.

    Raises:
        UserError: the ranks cannot be arranged so, or it cannot be simulated.
    """
    run, hardware = config.run, asked.hardware
    check_world_size(run, world_size)
    stages = run.parallel.pipeline_model_parallel_size
    jobs = [Job(config, world_size, asked.nodes_of, stage) for stage in simulated_stages(stages)]
    steps = run_all(jobs)
    average = _first_step(steps, world_size)
    time, whole = None, None
    if stages == 1:
        time, whole = hardware_answers(average, steps, run, asked, config.train_iters)
    rows = len(vocabulary.tags.row_ids)
    booking = Booking(
        layout=layout_of(run, world_size),
        gpu=asked.gpu,
        attainable_share=asked.attainable_share,
        heaviest_step=0,
        longest_microbatch=None,
        memory=tuple(stage_memory(job.stage, step, hardware) for job, step in zip(jobs, steps, strict=True)),
        longest_that_fits=None,
        average=average,
        messages=messages_of(steps),
        time=time,
        run=whole,
        checkpoint_bytes=estimate_size(run, vocabulary.size, rows, config.policy.last_layers).whole,
        simulated_seconds=simulated_seconds(steps),
        traps=(),
    )
    return dataclasses.replace(booking, traps=(*room_traps(run, booking), *layout_traps(run, asked, booking)))


def _first_step(steps: Sequence[SimulatedStep], world_size: int) -> AverageStep:
    """The simulated step itself, as if all ranks did what the busiest stage does."""

    def flops(name: str, recomputed: bool) -> float:
        of_steps = [[s.flops for s in step.sections if s.name == name] for step in steps]
        return max(sum(f.model + recomputed * f.recomputed for f in of_step) for of_step in of_steps)

    scoring, training = flops("scoring", True), flops("training", True)
    model = flops("training", False) * world_size
    return AverageStep(
        matching_flops=scoring,
        training_flops=training,
        waiting_flops=0.0,
        matching_idle=0.0,
        training_idle=0.0,
        matching_ratio=1.0,
        training_ratio=1.0,
        last_microbatch=0.0,
        model_flops=model,
        method_flops=model + scoring * world_size,
        tokens=None,
    )
