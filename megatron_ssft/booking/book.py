"""The answers to --dry-run --world-size: memory, FLOPs, bytes, time and traps of one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_ssft.booking.longest import longest_that_fits
from megatron_ssft.booking.memory import stage_memory
from megatron_ssft.booking.records import Booking, Layout, Messages, WholeRun
from megatron_ssft.booking.simulations import Job, run_all, simulated_stages
from megatron_ssft.booking.step_time import AverageStep, StepTime, average_step, step_time
from megatron_ssft.booking.survey import Epoch, Survey, cut_epoch, survey
from megatron_ssft.booking.traps import find_traps
from megatron_ssft.config import RunConfig, SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.parallel.checkpoint.checkpoint_size import estimate_size
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.topology import check_world_size
from megatron_ssft.tokenizers.vocabulary import Vocabulary


def book(config: SSFTConfig, world_size: int, asked: DryRun, dataset: SetDataset, vocabulary: Vocabulary) -> Booking:
    """Simulate the heaviest step of the data and tell what the run takes. Raises UserError."""
    check_world_size(config.run, world_size)
    epoch = cut_epoch(config, dataset)
    planned = survey(config, dataset, vocabulary, epoch, world_size // config.run.parallel.model_parallel_size)
    jobs = jobs_of(config, world_size, asked, planned)
    booking = account(config, asked, vocabulary, epoch, planned, jobs, run_all(jobs))
    return complete(booking, config, asked, dataset, vocabulary, planned)


def complete(
    booking: Booking, config: SSFTConfig, asked: DryRun, dataset: SetDataset, vocabulary: Vocabulary, planned: Survey
) -> Booking:
    """The booking with its traps and, where the GPU is known, with the longest sequences that would fit."""
    booking = dataclasses.replace(booking, traps=tuple(find_traps(config, asked, dataset, planned, booking)))
    if asked.hardware is None:
        return booking
    assert booking.longest_microbatch is not None, "a booking of SSFT"
    longest = longest_that_fits(config, asked.nodes_of, vocabulary, booking.fullest, booking.longest_microbatch)
    return dataclasses.replace(booking, longest_that_fits=longest)


def jobs_of(
    config: SSFTConfig, world_size: int, asked: DryRun, planned: Survey, stages: Sequence[int] | None = None
) -> list[Job]:
    """The simulations that a layout needs. `stages`: default: those that differ."""
    number, rank = planned.heaviest.number, planned.heaviest_rank
    stages = stages or simulated_stages(config.run.parallel.pipeline_model_parallel_size)
    return [Job(config, world_size, asked.nodes_of, stage, rank, number) for stage in stages]


def account(
    config: SSFTConfig,
    asked: DryRun,
    vocabulary: Vocabulary,
    epoch: Epoch,
    planned: Survey,
    jobs: Sequence[Job],
    steps: Sequence[SimulatedStep],
) -> Booking:
    """What follows from the simulated steps, but for traps and the longest sequences."""
    run, hardware = config.run, asked.hardware
    world_size = jobs[0].world_size
    memory = tuple(stage_memory(job.stage, step, hardware) for job, step in zip(jobs, steps, strict=True))
    microbatches = planned.heaviest.training.ranks[planned.heaviest_rank]
    tokens = [microbatch.size.tokens for microbatch in microbatches]
    average = average_step(planned, steps, run)
    time, whole = hardware_answers(average, steps, run, asked, epoch.steps)
    return Booking(
        layout=layout_of(run, world_size),
        gpu=asked.gpu,
        attainable_share=asked.attainable_share,
        heaviest_step=planned.heaviest.number,
        longest_microbatch=max(tokens),
        memory=memory,
        longest_that_fits=None,
        average=average,
        messages=messages_of(steps),
        time=time,
        run=whole,
        checkpoint_bytes=estimate_size(run, vocabulary.size, len(vocabulary.tags.row_ids)).whole,
        simulated_seconds=simulated_seconds(steps),
        traps=(),
    )


def hardware_answers(
    average: AverageStep, steps: Sequence[SimulatedStep], run: RunConfig, asked: DryRun, train_iters: int
) -> tuple[StepTime | None, WholeRun | None]:
    """An average step's time, and the run's; None where the GPU is not known."""
    hardware, world_size = asked.hardware, steps[0].world_size
    if hardware is None:
        return None, None
    time, quick, slow = (step_time(average, steps, run, asked, times) for times in (1.0, 1.2, 0.8))
    hours = time.total * train_iters / 3600
    whole = WholeRun(
        steps=train_iters,
        hours=hours,
        hours_least=quick.total * train_iters / 3600,
        hours_most=slow.total * train_iters / 3600,
        gpu_hours=hours * world_size,
        tokens_per_second=None if average.tokens is None else average.tokens / time.total,
        mfu=average.model_flops / (time.total * hardware.tflops * 1e12 * world_size),
    )
    return time, whole


def layout_of(run: RunConfig, world_size: int) -> Layout:
    """How the job is arranged."""
    parallel = run.parallel
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual=run.virtual_pipeline_size or 1,
        context=parallel.context_parallel_size,
        data=world_size // parallel.model_parallel_size,
    )


def messages_of(steps: Sequence[SimulatedStep]) -> Messages:
    """Of the busiest simulated stage."""

    def of(step: SimulatedStep, between: bool) -> int:
        messages = (message for section in step.sections for message in section.collectives)
        return sum(message.bytes for message in messages if message.between_nodes == between)

    return Messages(max(of(step, False) for step in steps), max(of(step, True) for step in steps))


def simulated_seconds(steps: Sequence[SimulatedStep]) -> float:
    """That the simulations took here, one after the other."""
    return sum(section.seconds for step in steps for section in step.sections)
