"""The questions of JSONL files, a row in memory at a time, with the traces that are kept."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike

from megatron_ssft.data.examples import parse_row
from megatron_ssft.data.trace_filter import TraceFilter
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.records import SetExample
from megatron_ssft.seeded import text_digest


@dataclass
class ReadReport:
    """Counters of reading: questions and traces that stayed, and those left out."""

    questions: int = 0
    """Questions kept."""
    traces: int = 0
    """Traces kept."""
    questions_dropped: int = 0
    """Questions none of whose traces passed the filter."""
    traces_filtered: int = 0
    """Traces that did not pass the filter."""
    traces_sampled_out: int = 0
    """Traces beyond --max-traces."""
    trace_count_histogram: dict[int, int] = field(default_factory=dict)
    """Number of traces -> number of kept questions that have so many, ascending."""


@dataclass(frozen=True)
class Selection:
    """Which traces of a question stay, and how many there may be."""

    num_tags: int | None
    """N, the largest allowed number of kept traces; None: any."""
    max_traces: int | None
    """How many are sampled of those that pass the filter. The sample depends on `seed` and the question's id alone."""
    trace_filter: TraceFilter | None
    seed: int


@dataclass(frozen=True)
class Shard:
    """A run of lines of one file that are tokenized together."""

    file: int
    """Place of the file among all."""
    path: str
    first_line: int
    begin: int
    """Byte of the file at which the first line begins."""
    end: int
    """Byte behind the last line."""
    questions: int
    """Those that are kept."""


class Reading:
    """One pass over the files, with one row in memory at a time."""

    def __init__(self, paths: Sequence[str | PathLike[str]], selection: Selection, shard_bytes: int) -> None:
        """`shard_bytes`: a shard ends with the line that makes it so large."""
        self._paths, self._selection, self._shard_bytes = paths, selection, shard_bytes
        self._wrong = WrongRows()
        self._first_use: dict[str, tuple[str | PathLike[str], int]] = {}
        self.report = ReadReport()
        self.shards: list[Shard] = []
        """Of all files, in order; complete after the pass."""

    def examples(self) -> Iterator[SetExample]:
        """All questions, in file and line order, filtered first and then sampled.

        Raises one UserError at the end for all wrong rows of all files, or for a filter that keeps nothing.
        """
        for number, path in enumerate(self._paths):
            try:
                yield from self._of_file(number, path)
            except OSError as error:
                self._wrong.add_unreadable(path, error)
        self._wrong.raise_if_any()
        report = self.report
        report.trace_count_histogram = dict(sorted(report.trace_count_histogram.items()))
        if not report.questions:
            raise UserError(
                f"--trace-filter {self._selection.trace_filter}: none of the {report.traces_filtered} traces in "
                f"{', '.join(map(str, self._paths))} matches; loosen the filter"
            )

    def _of_file(self, number: int, path: str | PathLike[str]) -> Iterator[SetExample]:
        rows = kept = begin = end = 0
        first_line = 1
        for line, raw, end in _numbered_rows(path):
            rows += 1
            try:
                example = self._checked(path, line, raw)
            except RowError as error:
                self._wrong.add(path, line, error)
            else:
                if example.traces:
                    self._count(example)
                    kept += 1
                    yield example
            if end - begin >= self._shard_bytes:
                self.shards.append(Shard(number, str(path), first_line, begin, end, kept))
                first_line, begin, kept = line + 1, end, 0
        if rows == 0:
            self._wrong.add(path, 1, "the file is empty; expected one JSON object a line")
        if end > begin:
            self.shards.append(Shard(number, str(path), first_line, begin, end, kept))

    def _checked(self, path: str | PathLike[str], line: int, raw: bytes) -> SetExample:
        example = parse_row(raw, str(path), line)
        if example.id in self._first_use:
            used = "{}:{}".format(*self._first_use[example.id])
            raise RowError(f"id {example.id!r} is already used at {used}; ids must be unique")
        self._first_use[example.id] = (path, line)
        selected = _select(example, self._selection, self.report)
        _check_num_traces(selected, self._selection.num_tags)
        return selected

    def _count(self, example: SetExample) -> None:
        count, histogram = len(example.traces), self.report.trace_count_histogram
        self.report.questions += 1
        self.report.traces += count
        histogram[count] = histogram.get(count, 0) + 1


def read_examples(
    paths: Sequence[str | PathLike[str]],
    *,
    num_tags: int | None,
    max_traces: int | None,
    trace_filter: TraceFilter | None,
    seed: int,
) -> tuple[list[SetExample], ReadReport]:
    """All questions of the files at once, and what was counted; see `Selection` and `Reading.examples`."""
    reading = Reading(paths, Selection(num_tags, max_traces, trace_filter, seed), shard_bytes=1 << 62)
    return list(reading.examples()), reading.report


def read_shard(shard: Shard, selection: Selection) -> Iterator[SetExample]:
    """The questions of a shard that are kept, one at a time. Raises RowError, OSError."""
    unread = ReadReport()
    for line, raw, end in _numbered_rows(shard.path, shard.first_line, shard.begin):
        example = _select(parse_row(raw, shard.path, line), selection, unread)
        if example.traces:
            yield example
        if end >= shard.end:
            return


def _numbered_rows(path: str | PathLike[str], first_line: int = 1, begin: int = 0) -> Iterator[tuple[int, bytes, int]]:
    """Lines that are not blank, with their 1-based numbers and the byte behind them; only a line feed ends a line.

    Raises OSError.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        end = begin
        for line, raw in enumerate(file, start=first_line):
            end += len(raw)
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield line, raw, end


def _select(example: SetExample, selection: Selection, report: ReadReport) -> SetExample:
    """`example` with the traces that stay (maybe none); what goes is counted in `report`."""
    traces, trace_filter, max_traces = example.traces, selection.trace_filter, selection.max_traces
    if trace_filter is not None:
        traces = tuple(trace for trace in traces if trace_filter.matches(trace))
        report.traces_filtered += len(example.traces) - len(traces)
        report.questions_dropped += not traces
    if max_traces is not None and len(traces) > max_traces:
        report.traces_sampled_out += len(traces) - max_traces
        # Ranking by hash instead of a generator: the same everywhere, and a smaller K is a subset of a larger one.
        ranked = sorted(range(len(traces)), key=lambda j: text_digest(selection.seed, j, example.id, joined_by="\n"))
        traces = tuple(traces[j] for j in sorted(ranked[:max_traces]))
    return dataclasses.replace(example, traces=traces)


def _check_num_traces(example: SetExample, num_tags: int | None) -> None:
    if num_tags is not None and len(example.traces) > num_tags:
        raise RowError(
            f"question {example.id!r} has {len(example.traces)} traces but there are only {num_tags} forking tokens; "
            "raise --num-forking-tokens or sample with --max-traces"
        )
