"""The demo's training runs: a summary of each, a table of them, and the bars they must meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table

from megatron_ssft.formats.run_logs import Run
from megatron_ssft.matching.statistics import (
    distinct_configurations,
    mutual_information_bits,
    tag_source_counts,
    whole_epochs,
)
from megatron_ssft.report.read.runs import final_mean, gap_by_iteration


@dataclass(frozen=True)
class Summary:
    """One run's row in the table; NaN where a figure does not apply."""

    name: str
    loss: float
    """Mean over the last 16 iterations."""
    gap_first: float = np.nan
    """Matching gap where first evaluated, in nats per question."""
    gap_final: float = np.nan
    """Mean matching gap of the last 16 iterations that have one, in nats per question."""
    distinct_first: float = np.nan
    """Different matchings in the first epoch."""
    distinct_last: float = np.nan
    """Different matchings in the last whole epoch."""
    bits: float = np.nan
    """Mutual information between tag and source in the last whole epoch."""
    seconds: float = np.nan
    """Sum over the steps."""
    matching_share: float = np.nan
    """Share of `seconds` spent on matching."""


def summarize(run: Run) -> Summary:
    """The table's row for `run`."""
    seconds = float(np.nansum(run.metrics["seconds"]))
    loss = final_mean(run.metrics["loss"])
    if run.name == "single":  # one tag for all traces: nothing is matched
        return Summary(run.name, loss, seconds=seconds)
    _, gaps = gap_by_iteration(run.metrics)
    epochs = whole_epochs(run.visits)
    distinct = distinct_configurations(run.visits)
    counts, _ = tag_source_counts(run.visits, epochs[-1], run.num_tags)
    return Summary(
        run.name,
        loss,
        gap_first=float(gaps[0]) if len(gaps) else np.nan,
        gap_final=final_mean(gaps),
        distinct_first=distinct[epochs[0]],
        distinct_last=distinct[epochs[-1]],
        bits=mutual_information_bits(counts),
        seconds=seconds,
        matching_share=float(np.nansum(run.metrics["matching_seconds"])) / seconds,
    )


def check_training(optimal: Summary, random: Summary) -> list[tuple[bool, str]]:
    """The bars of the runs: (met, the promise with the measured value). A figure that is missing meets no bar."""
    return [
        (optimal.gap_final >= 3, f"optimal: final matching gap {optimal.gap_final:.2f} nats per question, at least 3"),
        (random.gap_final <= 0.3, f"random: final matching gap {random.gap_final:.2f} nats per question, at most 0.3"),
        (
            optimal.distinct_last <= min(60, optimal.distinct_first / 2),
            f"optimal: {optimal.distinct_last:.0f} distinct matchings in the last epoch, at most 60 and at most half "
            f"of the first epoch's {optimal.distinct_first:.0f}",
        ),
        (
            random.distinct_last >= 0.9 * random.distinct_first,
            f"random: {random.distinct_last:.0f} distinct matchings in the last epoch, at least 0.9 of the first "
            f"epoch's {random.distinct_first:.0f}",
        ),
    ]


def training_table(summaries: list[Summary]) -> Table:
    """A row per run; fits 80 columns."""

    def show(value: float, form: str) -> str:
        return "-" if np.isnan(value) else format(value, form)

    table = Table(title="Matching on the synthetic demo set", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("matching", no_wrap=True)
    for header in (
        "final\nloss\n(nats)",
        "matching gap\nfirst / final\n(nats per q.)",
        "distinct\nmatchings,\nfirst -> last",
        "tag-source\nmut. inf.\n(bits)",
        "seconds",
        "spent in\nmatching",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for s in summaries:
        gap = f"{show(s.gap_first, '.2f')} / {show(s.gap_final, '.2f')}"
        distinct = f"{show(s.distinct_first, ',.0f')} -> {show(s.distinct_last, ',.0f')}"
        table.add_row(
            s.name,
            show(s.loss, ".3f"),
            "-" if np.isnan(s.gap_final) else gap,
            "-" if np.isnan(s.distinct_first) else distinct,
            show(s.bits, ".2f"),
            show(s.seconds, ".1f"),
            show(s.matching_share, ".0%"),
        )
    return table
