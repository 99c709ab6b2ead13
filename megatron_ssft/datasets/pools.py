"""Training sets from pools of traces: grouped by question, sampled, written for the training reader.

A pool may be larger than memory and its order arbitrary: rows are first dealt to files by a hash of their question,
then each of these is grouped, sampled and written by itself. So the result depends on the rows and the seed alone, not
on how they are spread over files, and its questions come in the order of that hash.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from megatron_ssft.datasets.pool_formats import FORMATS, detect_format
from megatron_ssft.datasets.pool_rows import FormatOptions, PoolRow
from megatron_ssft.datasets.tables import Progress, Row, check_row, parsed_rows, question_key, total_bytes
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.jsonl import RowError, WrongRows, write_objects
from megatron_ssft.seeded import json_digest

DUPLICATE = "the same as another one"
INCORRECT = "incorrect"
BEYOND_SOURCE = "beyond --per-source"
BEYOND_TRACES = "beyond --traces"
_PARTS = 64


@dataclass(frozen=True)
class PoolOptions:
    """Which traces of a question stay."""

    format: str | None = None
    """One of FORMATS; None: told by the fields of each file's first row."""
    traces: int | None = None
    """M, at most so many traces per question."""
    per_source: int | None = None
    """K, at most so many of one source; traces of unknown source count as one source."""
    min_traces: int = 1
    """Questions with fewer are left out."""
    keep_incorrect: bool = True
    """Keep traces that are known to be wrong; those of which nothing is known always stay."""
    seed: int = 0
    reading: FormatOptions = FormatOptions()


@dataclass
class PoolReport:
    """Counters of a pool: rows read, questions and traces that stayed, reasons for the rest."""

    formats: Counter[str] = field(default_factory=Counter)
    """Format -> rows."""
    rows: int = 0
    traces_read: int = 0
    questions_read: int = 0
    """Different ones."""
    traces_left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> traces."""
    questions_left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> questions."""
    notes: Counter[str] = field(default_factory=Counter)
    """Remark -> rows or questions."""
    questions: int = 0
    traces: int = 0
    trace_counts: Counter[int] = field(default_factory=Counter)
    """Number of traces -> questions kept that have so many."""
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Source -> `correct`, `incorrect`, `unknown` -> traces kept."""


def build_pool(
    paths: Sequence[Path], output: Path, options: PoolOptions, progress: Progress | None = None
) -> PoolReport:
    """Write the training set made of the pools in `paths` to `output`, whole or not at all.

    Needs room for a copy of the pools beside `output`. Raises one UserError for all wrong rows, for a set in which no
    question is left, and for a disk that refuses.
    """
    for flag in ("traces", "per_source", "min_traces"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    if options.traces is not None and options.min_traces > options.traces:
        raise UserError(f"--min-traces {options.min_traces}: is more than --traces {options.traces}")
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise UserError(f"--output {output}: is one of the pools; give another --output")
    report = PoolReport()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            parts = _deal(paths, Path(folder), options, report, progress)
            write_objects(output, _questions(parts, options, report))
    except OSError as error:
        raise UserError(f"{output}: cannot write the set: {reason_of(error)}; give another --output") from error
    return report


def _deal(
    paths: Sequence[Path], folder: Path, options: PoolOptions, report: PoolReport, progress: Progress | None
) -> list[Path]:
    """Read all rows and deal them to files in `folder`; returns these. Raises UserError, OSError."""
    wrong = WrongRows()
    ids: dict[str, tuple[str, str]] = {}
    parts = [folder / f"{number}.jsonl" for number in range(_PARTS)]
    before = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "w", encoding="ascii")) for part in parts]
        for path in paths:
            reader = _Reader(options)
            report_bytes = None if progress is None else lambda done, before=before: progress(before + done)
            for file, line, (format_name, row) in parsed_rows([path], reader.parse, wrong, report_bytes):
                key, place = question_key(row.question), f"{file}:{line}"
                if format_name == "project" and ids.setdefault(row.id, (key, place))[0] != key:
                    wrong.add(
                        file, line, f"id {row.id!r} is another question's at {ids[row.id][1]}; ids must be unique"
                    )
                    continue
                _count(row, format_name, report)
                record = DealtRow(key=key, place=place, question=row.question, traces=row.traces)
                files[int(key[:2], 16) * _PARTS // 256].write(json.dumps(record, default=str) + "\n")
            before += total_bytes([path])
    wrong.raise_if_any()
    return parts


class DealtRow(TypedDict):
    """One row of a pool, as it waits for the others that ask the same."""

    key: str
    """The question's `question_key`."""
    place: str
    """`file:line`."""
    question: Row
    traces: list[Row]


class _Reader:
    """Reads the rows of one file, in the format that the first of them shows."""

    def __init__(self, options: PoolOptions) -> None:
        self.format = options.format
        self._options = options

    def parse(self, row: Row) -> tuple[str, PoolRow]:
        """The format's name and what the row holds. Raises RowError."""
        self.format = self.format or detect_format(row)
        return self.format, FORMATS[self.format](row, self._options.reading)


def _count(row: PoolRow, name: str, report: PoolReport) -> None:
    report.rows += 1
    report.formats[name] += 1
    report.traces_read += len(row.traces) + row.left_out.total()
    report.traces_left_out.update(row.left_out)
    report.notes.update(row.notes)


def _questions(parts: Iterable[Path], options: PoolOptions, report: PoolReport) -> Iterator[Row]:
    """The questions that stay, with their traces. Raises UserError if there is none, or for what cannot be written."""
    wrong = WrongRows()
    for part in parts:
        with open(part, encoding="ascii") as file:
            records: list[DealtRow] = sorted(map(json.loads, file), key=lambda record: record["key"])
        part.unlink()
        for _, group in itertools.groupby(records, key=lambda record: record["key"]):
            rows = list(group)
            report.questions_read += 1
            joined = _join(rows, options, report)
            if joined is None:
                continue
            question, traces = joined
            try:
                check_row(question)
            except RowError as error:
                path, _, line = rows[0]["place"].rpartition(":")
                wrong.add(path, int(line), error)
                continue
            _count_kept(traces, report)
            yield question
    wrong.raise_if_any()
    if not report.questions:
        reasons = report.questions_left_out + report.traces_left_out
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "no traces at all"
        raise UserError(f"no question of {report.questions_read} is left ({left_out}); keep more of them")


def _join(rows: list[DealtRow], options: PoolOptions, report: PoolReport) -> tuple[Row, list[Row]] | None:
    """One question from all rows that ask it, and its traces that stay; None if they are too few."""
    questions = sorted((row["question"] for row in rows), key=lambda q: (q["id"], json.dumps(q, sort_keys=True)))
    question = questions[0]
    report.notes["rows joined to another with the same question"] += len(rows) - 1
    answers = {json.dumps(q["answer"]) for q in questions if "answer" in q}
    report.notes["questions with different answers in different rows"] += len(answers) > 1
    traces = sorted((t for row in rows for t in row["traces"]), key=lambda t: json.dumps(t, sort_keys=True))
    distinct = {(t["text"], t.get("answer")): t for t in reversed(traces)}
    report.traces_left_out[DUPLICATE] += len(traces) - len(distinct)
    candidates = [t for t in distinct.values() if options.keep_incorrect or t.get("correct") is not False]
    report.traces_left_out[INCORRECT] += len(distinct) - len(candidates)
    choice = choose_traces(candidates, str(question["id"]), options, report.traces_left_out)
    if len(choice) < options.min_traces:
        report.questions_left_out["fewer than --min-traces" if choice else "without traces"] += 1
        report.traces_left_out["of a question left out"] += len(choice)
        return None
    return {**question, "traces": choice}, choice


def choose_traces(traces: Sequence[Row], name: str, options: PoolOptions, left_out: Counter[str]) -> list[Row]:
    """At most `per_source` traces of a source and `traces` in all: first one of every source, then a second, ...

    Which ones, and in which order, depends on the seed, the question's id `name` and the traces, not on their order;
    fewer are the beginning of more. What goes is counted in `left_out`.
    """

    def rank(*parts: object) -> bytes:
        return json_digest(options.seed, name, *parts)

    sources: dict[object, list[Row]] = {}
    for trace in sorted(traces, key=lambda t: rank("trace", t["text"], t.get("answer"))):
        sources.setdefault(trace.get("source"), []).append(trace)
    columns = [sources[source] for source in sorted(sources, key=lambda source: rank("source", source))]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*(column[: options.per_source] for column in columns)))
    candidates = [trace for trace in rounds if trace is not None]
    left_out[BEYOND_SOURCE] += len(traces) - len(candidates)
    choice = candidates[: options.traces]
    left_out[BEYOND_TRACES] += len(candidates) - len(choice)
    return choice


def _count_kept(traces: Sequence[Row], report: PoolReport) -> None:
    report.questions += 1
    report.traces += len(traces)
    report.trace_counts[len(traces)] += 1
    for trace in traces:
        correct = trace.get("correct")
        verdict = "unknown" if correct is None else "correct" if correct else "incorrect"
        report.by_source.setdefault(str(trace.get("source", "unknown")), Counter())[verdict] += 1
