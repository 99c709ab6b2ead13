"""Released data sets as local files to the project's questions and training sets.

    python tools/prepare_data.py benchmark --format math500 test.jsonl --output Q.jsonl
    python tools/prepare_data.py pool s1k-1.1.parquet --output SET.jsonl --traces 4 --per-source 1 --drop-incorrect
    python tools/prepare_data.py split SET.jsonl --output-dir DIR --held-out 0.1

IN: JSONL or JSON, CSV or TSV, each also gzipped, or parquet where pyarrow is installed; several are read as one.

benchmark  the questions of an evaluation set in the wording that published figures were measured with
pool       questions with several traces each, sampled; rows that ask the same become one set
split      train.jsonl and heldout.jsonl, no question in both
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

from rich.console import Console

from megatron_ssft.cli.entry import run_command
from megatron_ssft.datasets.benchmarks import BENCHMARKS, BenchmarkOptions, write_benchmark
from megatron_ssft.datasets.held_out import split_set
from megatron_ssft.datasets.pool_formats import FORMATS, FormatOptions
from megatron_ssft.datasets.pool_tables import pool_tables
from megatron_ssft.datasets.pools import PoolOptions, build_pool
from megatron_ssft.datasets.tables import total_bytes
from megatron_ssft.progress import bytes_read


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command, files and options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    benchmark, pool, split = (commands.add_parser(name) for name in ("benchmark", "pool", "split"))
    for command in (benchmark, pool, split):
        command.add_argument("inputs", nargs="+", type=Path, metavar="IN")
        command.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    benchmark.add_argument("--format", choices=BENCHMARKS, required=True)
    benchmark.add_argument("--output", type=Path, required=True, metavar="Q.jsonl")
    benchmark.add_argument("--since", type=day, metavar="YYYY-MM-DD", help="livecodebench: leave out earlier contests")
    benchmark.add_argument("--until", type=day, metavar="YYYY-MM-DD", help="livecodebench: leave out later contests")
    pool.add_argument("--output", type=Path, required=True, metavar="SET.jsonl")
    pool.add_argument("--format", choices=FORMATS, help="[told by the first row of a file]")
    pool.add_argument("--traces", type=int, metavar="M", help="at most M traces a question, distinct sources first")
    pool.add_argument("--per-source", type=int, metavar="K", help="at most K of them from one source")
    pool.add_argument("--min-traces", type=int, default=1, metavar="L", help="leave out questions with fewer [1]")
    pool.add_argument("--source", metavar="NAME", help="name of the teacher, where a row does not tell")
    pool.add_argument("--keep-system", action="store_true", help="OpenThoughts: keep the system prompt")
    judged = pool.add_mutually_exclusive_group()
    judged.add_argument("--keep-incorrect", action="store_true", default=True, help="the default")
    judged.add_argument("--drop-incorrect", action="store_false", dest="keep_incorrect", help="those known to be wrong")
    split.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    split.add_argument("--held-out", type=float, required=True, metavar="SHARE", help="of the questions, as in 0.1")
    return parser.parse_args(argv)


def day(text: str) -> str:
    """A date in the form in which dates compare as texts. Raises ValueError."""
    return date.fromisoformat(text).isoformat()


def main() -> None:
    """Parse, prepare, say what was made."""
    args = parse()
    console = Console() if sys.stdout.isatty() else Console(width=100)
    with bytes_read(total_bytes(args.inputs)) as progress:
        if args.command == "benchmark":
            options = BenchmarkOptions(args.seed, args.since, args.until)
            count = write_benchmark(args.inputs, args.output, args.format, options, progress)
            lines = [f"{count} questions: {args.output}"]
        elif args.command == "pool":
            options = PoolOptions(
                format=args.format,
                traces=args.traces,
                per_source=args.per_source,
                min_traces=args.min_traces,
                keep_incorrect=args.keep_incorrect,
                seed=args.seed,
                reading=FormatOptions(args.source, args.keep_system),
            )
            lines = [*pool_tables(build_pool(args.inputs, args.output, options, progress)), f"set: {args.output}"]
        else:
            report = split_set(args.inputs, args.output_dir, args.held_out, args.seed, progress)
            lines = [f"{report.train_rows} rows: {report.train}", f"{report.held_out_rows} rows: {report.held_out}"]
            if report.repeated:
                lines.append(f"{report.repeated} rows ask what another row asks; they went to its side")
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str), highlight=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
