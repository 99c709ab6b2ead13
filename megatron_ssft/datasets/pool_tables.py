"""Report on a pool as tables of at most 100 columns."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.markup import escape
from rich.table import Table

from megatron_ssft.datasets.pools import PoolReport

_MAX_ROWS = 16


def pool_tables(report: PoolReport) -> list[Table]:
    """Tables of what was read and left out, of traces per question, and of traces of each source."""
    summary = _table("Pool", "", "questions", "traces")
    formats = ", ".join(f"{count} rows of {name}" for name, count in report.formats.most_common())
    summary.add_row(f"read ({formats})", f"{report.questions_read}", f"{report.traces_read}")
    for reason, count in report.traces_left_out.most_common():
        if count:
            summary.add_row(f"left out: {reason}", "", f"{count}")
    for reason, count in report.questions_left_out.most_common():
        summary.add_row(f"left out: {reason}", f"{count}", "")
    summary.add_row("kept", f"{report.questions}", f"{report.traces}", style="bold")
    for remark, count in report.notes.most_common():
        if count:
            summary.add_row(f"note: {remark}", f"{count}", "")
    counts = _table("Traces a question", "traces", "questions")
    for traces, questions in _shortened(report.trace_counts):
        counts.add_row(traces, f"{questions}")
    verdicts = ("correct", "incorrect", "unknown")
    sources = _table("Sources", "source", *verdicts)
    by_size = sorted(report.by_source.items(), key=lambda item: (-item[1].total(), item[0]))
    for source, counter in by_size[:_MAX_ROWS]:
        sources.add_row(escape(source), *(f"{counter[verdict]}" for verdict in verdicts))
    remainder = sum((counter for _, counter in by_size[_MAX_ROWS:]), Counter())
    if remainder:
        sources.add_row(f"{len(by_size) - _MAX_ROWS} others", *(f"{remainder[verdict]}" for verdict in verdicts))
    return [summary, counts, sources]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, max_width=64)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _shortened(counts: Counter[int]) -> list[tuple[str, int]]:
    """Ascending; the long end is one row."""
    rows = sorted(counts.items())
    shown = [(f"{traces}", questions) for traces, questions in rows[:_MAX_ROWS]]
    if rest := rows[_MAX_ROWS:]:
        shown.append((f"{rest[0][0]} to {rest[-1][0]}", sum(questions for _, questions in rest)))
    return shown
