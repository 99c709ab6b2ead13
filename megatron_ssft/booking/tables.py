"""The answers in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_ssft.booking.advise import Advice, Candidate
from megatron_ssft.booking.memory import UNSEEN_BYTES, UNSEEN_SHARE
from megatron_ssft.booking.records import Booking
from megatron_ssft.parallel.checkpoint.checkpoint_size import shown
from megatron_ssft.parallel.simulated.records import PARTS


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns: the first to the left, the others to the right; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines


def booking_lines(booking: Booking) -> list[str]:
    """Everything that was found out about one layout."""
    layout, average, time, run = booking.layout, booking.average, booking.time, booking.run
    gpus = f"{layout.world_size} GPUs" if booking.gpu is None else f"{layout.world_size} x {booking.gpu}"
    virtual = f" (x {layout.virtual} chunks)" if layout.virtual > 1 else ""
    lines = [
        f"# the job: {gpus}, tensor {layout.tensor} x pipeline {layout.pipeline}{virtual} x context {layout.context} x "
        f"data {layout.data}",
        f"memory in GiB at {_which_step(booking)}; needed: the peak, {UNSEEN_SHARE:.0%} and {_gib(UNSEEN_BYTES)} for "
        "what a simulation does not see",
        *table(_memory_rows(booking)),
    ]
    if layout.pipeline > 3:
        lines.append("the stages between have the second one's layers and hold fewer microbatches")
    if booking.longest_that_fits is not None:
        lines.append(f"a microbatch may have about {booking.longest_that_fits:,} tokens until the memory is full")
    lines += [
        f"a step takes {average.method_flops / 1e15:,.3g} PFLOP over all GPUs"
        + ("" if average.tokens is None else f" for {average.tokens:,.0f} trained tokens")
        + f", scoring {1 - average.model_flops / average.method_flops:.1%} of them; with what is recomputed the "
        f"busiest GPU does {(average.matching_flops + average.training_flops) / 1e15:.3g} PFLOP",
        f"messages of a GPU in the heaviest step: {shown(booking.messages.inside_nodes)} inside its node, "
        f"{shown(booking.messages.between_nodes)} between nodes",
    ]
    if layout.pipeline > 1:
        lines.append(
            f"stages wait {average.training_idle:.0%} of the training passes and {average.matching_idle:.0%} of the "
            "scoring passes"
        )
    if time is not None and run is not None:
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in vars(time).items() if seconds)
        lines += [
            f"an average step takes {time.total:.3g} s where kernels attain {booking.attainable_share:.0%} of the "
            f"peak: {parts}",
            ("" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f} tokens/s, ")
            + f"MFU {run.mfu:.0%}; {run.steps} steps: {run.hours:.3g} hours "
            f"({run.hours_least:.3g} to {run.hours_most:.3g} where kernels attain a fifth more or less), "
            f"{run.gpu_hours:,.0f} GPU-hours",
        ]
    return [*lines, *(f"trap: {trap}" for trap in booking.traps)]


def _which_step(booking: Booking) -> str:
    if booking.longest_microbatch is None:
        return "the first step"
    number, tokens = booking.heaviest_step, booking.longest_microbatch
    return f"the heaviest step of the data (number {number}, microbatches of up to {tokens:,} tokens)"


def _memory_rows(booking: Booking) -> list[list[str]]:
    parts = [part for part in PARTS if any(memory.parts.get(part) for memory in booking.memory)]
    head = ["stage", *parts, "between steps", "peak", "needed"]
    if booking.gpu is not None:
        head += ["free"]
    rows = [head]
    for memory in booking.memory:
        row = [str(memory.stage), *(_gib(memory.parts.get(part, 0)) for part in parts)]
        row += [_gib(memory.between_steps), _gib(memory.peak), _gib(memory.needed)]
        if memory.margin is not None:
            row.append(_gib(memory.margin) if memory.margin >= 0 else f"{_gib(memory.margin)} NOT ENOUGH")
        rows.append(row)
    return rows


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def advice_lines(advice: Advice) -> list[str]:
    """The ranked layouts, with reasons, and the best one's flags."""
    head = ["layout", "recompute", "tokens", "step s", "hours", "MFU", "needed", "free", "waits", "tensor", "by"]
    rows = [head]
    for candidate in advice.candidates:
        booking, parallel = candidate.booking, candidate.config.run.parallel
        assert booking.time is not None and booking.run is not None, "advice is about a GPU"
        fullest = booking.fullest
        rows.append(
            [
                _name(candidate),
                parallel.recompute_granularity or "none",
                f"{candidate.config.run.train_tokens_per_microbatch:,}",
                f"{booking.time.total:.3g}",
                f"{booking.run.hours:.3g}",
                f"{booking.run.mfu:.0%}",
                _gib(fullest.needed),
                _gib(fullest.margin or 0) + ("" if booking.fits else " NOT ENOUGH"),
                f"{booking.time.waiting / booking.time.total:.0%}",
                f"{booking.time.tensor / booking.time.total:.0%}",
                "simulation" if candidate.is_simulated else "formula",
            ]
        )
    best = advice.best
    lines = [
        f"# layouts of {advice.world_size} x {best.booking.gpu}, the best first: {advice.looked_at} planned, "
        f"{advice.too_large} more cannot fit; needed and free in GiB",
        *table(rows),
        "waits: stages for each other; tensor: messages between tensor-parallel ranks; both as shares of the step",
        "context parallelism is left out: it needs TransformerEngine, which cannot be simulated",
    ]
    simulated = [best, *(each for each in advice.candidates if each.is_simulated and each is not best)]
    for place, candidate in enumerate(simulated, start=1):
        lines.append(f"{place}. {_name(candidate)}: {'; '.join(_reasons(candidate, best))}")
        lines.append(f"   {candidate.flags}")
        if candidate.config.run.parallel.recompute_granularity is None:
            lines.append("   and no recompute_granularity in the configuration file")
    return lines


def _name(candidate: Candidate) -> str:
    layout = candidate.booking.layout
    return f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}"


def _reasons(candidate: Candidate, best: Candidate) -> Iterator[str]:
    """What speaks for a layout and against it."""
    booking = candidate.booking
    assert booking.time is not None, "advice is about a GPU"
    total = booking.time.total
    if not booking.fits:
        yield "does not fit"
    if candidate is not best:
        yield f"{candidate.seconds / best.seconds - 1:+.0%} time"
    yield (
        "no stage waits"
        if booking.layout.pipeline == 1
        else f"stages wait {booking.time.waiting / total:.0%} of a step"
    )
    if booking.layout.tensor > 1:
        yield f"tensor-parallel messages take {booking.time.tensor / total:.0%}"
    if candidate.without_recompute is not None:
        yield f"without recomputing it would need {_gib(candidate.without_recompute)} GiB"
    yield f"{_gib(booking.fullest.margin or 0)} GiB free"
