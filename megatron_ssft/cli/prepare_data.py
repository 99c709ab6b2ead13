"""Released data sets as local files to the project's questions and training sets.

    megatron-ssft prepare-data benchmark --format math500 test.jsonl --output Q.jsonl
    megatron-ssft prepare-data benchmark --format gpqa gpqa.csv --output Q.jsonl --prompt-template words.txt
    megatron-ssft prepare-data pool s1k-1.1.parquet --output SET.jsonl --traces 4 --per-source 1 --drop-incorrect
    megatron-ssft prepare-data split SET.jsonl --output-dir DIR --held-out 0.1
    megatron-ssft prepare-data tokenize --data-path DIR/train.jsonl ... (the flags of train)

IN: JSONL or JSON, CSV or TSV, each also gzipped, or parquet where pyarrow is installed; several are read as one.

benchmark  the questions of an evaluation set, asked in our own words, in those of a file, or in lighteval's
pool       questions with several traces each, sampled; rows that ask the same become one set
split      train.jsonl and heldout.jsonl, no question in both
tokenize   a training set to the cache that train reads, by several processes; tokenize --help lists its flags
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table

from megatron_ssft.cli.options import parse_action
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag
from megatron_ssft.datasets.benchmark_rows import BenchmarkOptions
from megatron_ssft.datasets.benchmarks import BENCHMARKS, KINDS, write_benchmark
from megatron_ssft.datasets.held_out import split_set
from megatron_ssft.datasets.lighteval_prompts import TASKS as LIGHTEVAL_TASKS
from megatron_ssft.datasets.lighteval_prompts import lighteval_wording
from megatron_ssft.datasets.pool_formats import FORMATS
from megatron_ssft.datasets.pool_rows import FormatOptions
from megatron_ssft.datasets.pool_tables import pool_tables
from megatron_ssft.datasets.pools import PoolOptions, build_pool
from megatron_ssft.datasets.prompts import read_template
from megatron_ssft.datasets.tables import Progress, total_bytes
from megatron_ssft.progress import bytes_read


def day(text: str) -> str:
    """A date in the form in which dates compare as texts. Raises ValueError."""
    return date.fromisoformat(text).isoformat()


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Flags that all actions share."""

    inputs: Annotated[tuple[Path, ...], Flag(metavar="IN", positional=True)]
    """Local files of a data set."""
    seed: int = 0
    """Decides every draw."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkFlags(InputFlags):
    """The questions of an evaluation set, asked in our own words, in those of a file, or in lighteval's."""

    format: Annotated[str, Flag(choices=tuple(BENCHMARKS))]
    """Name of the evaluation set."""
    output: Annotated[Path, Flag(metavar="Q.jsonl")]
    """Questions."""
    since: Annotated[str | None, Flag(metavar="YYYY-MM-DD", read=day)] = None
    """livecodebench: leave out earlier contests."""
    until: Annotated[str | None, Flag(metavar="YYYY-MM-DD", read=day)] = None
    """livecodebench: leave out later contests."""

    prompt: Literal["own", "lighteval"] = "own"
    """Words around a question: our own, or those of an installed lighteval, read from it."""
    prompt_template: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Words around a question: a text with {question}; gpqa: and {choices}, or {A}, {B}, {C} and {D};
    livecodebench: and {starter_code}. {{ and }} stand for braces."""
    lighteval_python: Annotated[Path | None, Flag(metavar="PYTHON")] = None
    """--prompt lighteval: interpreter of the environment that has it; default: this one."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        asked = "--prompt lighteval" if self.prompt == "lighteval" else "--prompt-template"
        foreign = self.prompt == "lighteval" or self.prompt_template is not None
        require(
            self.prompt == "own" or self.prompt_template is None,
            "--prompt-template: not allowed with --prompt lighteval; give one",
        )
        require(
            self.lighteval_python is None or self.prompt == "lighteval",
            "--lighteval-python: is for --prompt lighteval; leave it out",
        )
        require(
            not foreign or self.format in KINDS,
            f"{asked}: the prompts of {self.format} carry instructions of their own and are kept; leave it out",
        )
        require(
            self.prompt == "own" or self.format in LIGHTEVAL_TASKS,
            f"--prompt lighteval: read for {', '.join(LIGHTEVAL_TASKS)} only; give {self.format} a --prompt-template",
        )

    def run(self, progress: Progress) -> list[str | Table]:
        """Write the questions; returns what there is to say."""
        wording, lines = None, list[str | Table]()
        if self.prompt == "lighteval":
            wording, origin = lighteval_wording(self.format, self.lighteval_python)
            lines.append(f"asked in the words of {origin}")
        elif self.prompt_template is not None:
            wording = read_template(self.prompt_template, KINDS[self.format])
            lines.append(f"asked in the words of {self.prompt_template}")
        options = BenchmarkOptions(self.seed, self.since, self.until, wording)
        notes: Counter[str] = Counter()
        count = write_benchmark(self.inputs, self.output, self.format, options, progress, notes)
        lines += [f"note: {number} {remark}" for remark, number in (+notes).most_common()]
        return [*lines, f"{count} questions: {self.output}"]


@dataclass(frozen=True, kw_only=True)
class PoolFlags(InputFlags):
    """Questions with several traces each, sampled; rows that ask the same become one set."""

    output: Annotated[Path, Flag(metavar="SET.jsonl")]
    """Training set."""
    format: Annotated[str | None, Flag(choices=tuple(FORMATS))] = None
    """Name of the data set; default: told by the first row of a file."""
    traces: Annotated[int | None, Flag(metavar="M")] = None
    """At most M traces per question, distinct sources first."""
    per_source: Annotated[int | None, Flag(metavar="K")] = None
    """At most K of them from one source."""
    min_traces: Annotated[int, Flag(metavar="L")] = 1
    """Leave out questions with fewer."""
    source: Annotated[str | None, Flag(metavar="NAME")] = None
    """Name of the teacher, where a row does not tell."""
    keep_system: bool = False
    """OpenThoughts: keep the system prompt."""
    keep_incorrect: bool = False
    """Keep traces known to be wrong, which is the default."""
    drop_incorrect: bool = False
    """Leave out traces known to be wrong."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        both = self.keep_incorrect and self.drop_incorrect
        require(not both, "--drop-incorrect: not allowed with --keep-incorrect; give one")

    def run(self, progress: Progress) -> list[str | Table]:
        """Write the training set; returns what there is to say."""
        options = PoolOptions(
            format=self.format,
            traces=self.traces,
            per_source=self.per_source,
            min_traces=self.min_traces,
            keep_incorrect=not self.drop_incorrect,
            seed=self.seed,
            reading=FormatOptions(self.source, self.keep_system),
        )
        report = build_pool(self.inputs, self.output, options, progress)
        return [*pool_tables(report), f"set: {self.output}"]


@dataclass(frozen=True, kw_only=True)
class SplitFlags(InputFlags):
    """train.jsonl and heldout.jsonl, no question in both."""

    output_dir: Annotated[Path, Flag(metavar="DIR")]
    """Folder of the two files."""
    held_out: Annotated[float, Flag(metavar="SHARE")]
    """Share of the questions, as in 0.1."""

    def run(self, progress: Progress) -> list[str | Table]:
        """Write the two files; returns what there is to say."""
        report = split_set(list(self.inputs), self.output_dir, self.held_out, self.seed, progress)
        lines: list[str | Table] = [
            f"{report.train_rows} rows: {report.train}",
            f"{report.held_out_rows} rows: {report.held_out}",
        ]
        if report.repeated:
            lines.append(f"{report.repeated} rows ask what another row asks; they went to its side")
        return lines


ACTIONS: dict[str, type[BenchmarkFlags | PoolFlags | SplitFlags]] = {
    "benchmark": BenchmarkFlags,
    "pool": PoolFlags,
    "split": SplitFlags,
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, prepare, say what was made. Raises UserError."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["tokenize"]:  # its flags are those of another program
        from megatron_ssft.cli import tokenize_data

        tokenize_data.main(words[1:], None if prog is None else f"{prog} tokenize")
        return
    flags = parse_action(ACTIONS, __doc__, words, prog)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    with bytes_read(total_bytes(flags.inputs)) as progress:
        lines = flags.run(progress)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str), highlight=False)
