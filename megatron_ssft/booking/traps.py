"""Known mistakes in a job's configuration, each told in a sentence that says what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np

from megatron_ssft.booking.memory import with_allowance
from megatron_ssft.booking.records import Booking
from megatron_ssft.booking.survey import Survey
from megatron_ssft.config import RunConfig, SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.parallel.device_defaults import decided
from megatron_ssft.records import TokenizedSet
from megatron_ssft.scheduling.sequences import distinct_traces

MUCH_IDLE = 0.15
"""Share of the pipeline's time that stages may wait before it is a trap."""
MUCH_WAITING = 0.15
"""By how much the slowest data-parallel rank may exceed the mean."""
MUCH_MATCHING = 0.3
"""Share of the training's FLOPs that the matching may take."""
_QUESTIONS = 200
"""Of the data, that are looked at."""


def find_traps(
    config: SSFTConfig, asked: DryRun, dataset: SetDataset, planned: Survey, booking: Booking
) -> Iterator[str]:
    """A sentence for each."""
    run = config.run
    yield from _memory(run, planned, booking)
    yield from _waiting(run, planned, booking)
    yield from layout_traps(run, asked, booking)
    if config.matching.matching == "optimal":
        yield from _matching(config, dataset, booking)


def _memory(run: RunConfig, planned: Survey, booking: Booking) -> Iterator[str]:
    fullest, recompute = booking.fullest, run.parallel.recompute_granularity
    yield from room_traps(run, booking)
    if recompute != "full" or fullest.gpu is None or not booking.fits:
        return
    if with_allowance(_without_recompute(run, planned, booking)) <= fullest.gpu:
        yield (
            "recomputing is needless: all activations fit; leave --recompute-granularity out, which saves a forward "
            "pass of three"
        )


def room_traps(run: RunConfig, booking: Booking) -> Iterator[str]:
    """Where the memory is too small."""
    fullest, recompute = booking.fullest, run.parallel.recompute_granularity
    if fullest.margin is not None and fullest.margin < 0:
        means = [] if recompute == "full" else ["--recompute-granularity full"]
        if booking.layout.data > 1 and not run.parallel.use_distributed_optimizer:
            means.append("--use-distributed-optimizer")
        means += ["more GPUs", "a shorter --seq-length"]
        yield (
            f"it does not fit: stage {fullest.stage} needs {_gib(fullest.needed)} of {_gib(fullest.gpu)}; "
            f"{' or '.join(means)}"
        )


def _without_recompute(run: RunConfig, planned: Survey, booking: Booking) -> float:
    """Bytes of the fullest stage at the peak if every layer kept its activations; rather too many.

    One recomputed layer is there in whole, with the gradients of its backward pass, beside the inputs of all others.
    """
    model, parallel = run.model, run.parallel
    assert model.num_layers and model.hidden_size, "a configuration has its defaults filled in"
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    fullest = booking.fullest
    tokens = [microbatch.size.tokens for microbatch in planned.heaviest.training.ranks[planned.heaviest_rank]]
    in_flight = min(parallel.pipeline_model_parallel_size, len(tokens))
    together = max(sum(tokens[i : i + in_flight]) for i in range(len(tokens)))
    sharded = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    inputs = 2.0 * model.hidden_size * layers * together / sharded
    whole = max(0.0, fullest.peak - fullest.state - inputs)
    return fullest.state + whole * layers * together / max(tokens)


def _waiting(run: RunConfig, planned: Survey, booking: Booking) -> Iterator[str]:
    idle, stages = booking.average.training_idle, booking.layout.pipeline
    if idle > MUCH_IDLE:
        counts = [len(of_rank) for step in planned.sampled for of_rank in step.training.ranks]
        yield (
            f"{idle:.0%} of the pipeline's time stages wait: {stages} of them share {fmean(counts):.0f} microbatches; "
            "fewer stages, more traces a step, or --num-layers-per-virtual-pipeline-stage"
        )
    works = [[sum(planned.forward(of_rank)) for of_rank in step.training.ranks] for step in planned.sampled]
    excess = fmean(max(of_ranks) / fmean(of_ranks) - 1 for of_ranks in works)
    if excess > MUCH_WAITING:
        yield (
            f"data-parallel ranks wait {excess / (1 + excess):.0%} of the time for the slowest: their longest "
            "sequences differ too much to be balanced; fewer of them, or more traces a step"
        )
    pads = fmean(step.training.pad_sequences for step in planned.sampled)
    if pads >= 0.5:
        yield f"{pads:.1f} PAD sequences a step on average: there are fewer traces than microbatches; fewer ranks"


def layout_traps(run: RunConfig, asked: DryRun, booking: Booking) -> Iterator[str]:
    """Of the arrangement of ranks alone."""
    parallel, layout = run.parallel, booking.layout
    if layout.tensor > asked.nodes_of:
        yield f"tensor parallelism over {layout.tensor} GPUs leaves the node of {asked.nodes_of}; keep it inside"
    if layout.tensor > 1 and not parallel.sequence_parallel:
        yield "no sequence parallelism: every tensor-parallel rank keeps all activations; give --sequence-parallel"
    if layout.data > 1 and not parallel.use_distributed_optimizer:
        yield (
            "every data-parallel rank keeps the whole optimizer; --use-distributed-optimizer divides it by "
            f"{layout.data}"
        )
    hidden = decided(run, on_gpu=True).parallel.overlap_grad_reduce
    if booking.time is not None and booking.time.data > 0.02 * booking.time.total and not hidden:
        yield (
            f"gradients are reduced when all else is done, {booking.time.data / booking.time.total:.0%} of the step; "
            "--overlap-grad-reduce hides them behind the backward pass"
        )
    if layout.world_size > asked.nodes_of and layout.world_size % asked.nodes_of:
        yield f"{layout.world_size} GPUs are no whole nodes of {asked.nodes_of}"


def _matching(config: SSFTConfig, dataset: SetDataset, booking: Booking) -> Iterator[str]:
    first = config.matching.matching_tokens
    places = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _QUESTIONS)).round().astype(int)).tolist()
    sets = [dataset[place] for place in places]
    alike = sum(_is_alike(example, first) for example in sets)
    if alike:
        yield (
            f"--matching-tokens {first}: in {alike} of {len(sets)} questions looked at, traces that differ do not yet "
            "within so many tokens and cannot be told apart; raise it"
        )
    lengths = np.concatenate([[len(ids) for ids in example.completion_ids] for example in sets])
    whole = float((lengths <= first).mean())
    if whole > 0.5:
        yield (
            f"--matching-tokens {first}: {whole:.0%} of the traces are not longer and are scored in whole; their first "
            f"{_quarter(lengths)} tokens may do"
        )
    average = booking.average
    share = average.matching_flops / average.training_flops
    if share > MUCH_MATCHING:
        yield (
            f"matching takes {share:.0%} of the training's FLOPs; a smaller --matching-tokens, or --matching-interval "
            "to reuse assignments"
        )


def _is_alike(example: TokenizedSet, first: int) -> bool:
    """Whether two traces that are not the same cannot be told apart by their first tokens."""
    different = len(set(distinct_traces(example, max(map(len, example.completion_ids)))))
    return len(set(distinct_traces(example, first))) < different


def _quarter(lengths: Sequence[int] | np.ndarray) -> int:
    return max(1, math.ceil(float(np.median(lengths)) / 4))


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f} GiB"
