"""Turn scored rollouts into figures: pass@k, votes, tags, their agreement; one file or several side by side.

    python tools/evaluate.py S.jsonl [S2.jsonl ...] --output DIR
    python tools/evaluate.py S.jsonl --output DIR --protocol published --pass-tag 0
    python tools/evaluate.py S.jsonl --output DIR --group-by subject --data Q.jsonl --answers math

Writes DIR/evaluation.json (all figures; megatron_ssft/formats/evaluation.py lists its keys) and DIR/tables.md, and
prints the tables. Tags are 0-based here and in files; tables write <think1> for tag 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.figures import PROTOCOLS, Options, evaluate
from megatron_ssft.evaluation.scored_runs import ScoredRun, load_runs, read_groups
from megatron_ssft.evaluation.tables import all_tables, counted, to_markdown, to_rich, warnings
from megatron_ssft.formats.files import write_durably
from megatron_ssft.scoring.verifiers.math_equivalence import MathEquivalence


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Files and what to make of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scored", nargs="+", type=Path, metavar="S.jsonl", help="made by tools/score.py")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="both", help="rules of the votes [%(default)s]")
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help="of pass@k and cons@k [powers of two, and N]")
    parser.add_argument(
        "--answers",
        choices=("string", "math"),
        default="string",
        help="how our votes compare answers; the published rule always compares strings [%(default)s]",
    )
    parser.add_argument("--pass-tag", type=int, metavar="TAG", help="published pass@1 [0, or a file's only tag]")
    parser.add_argument("--group-by", metavar="FIELD", help="best tag for each value of this field of --data")
    parser.add_argument("--data", type=Path, metavar="Q.jsonl", help="the questions, for --group-by")
    arguments = parser.parse_args(argv)
    if arguments.k and min(arguments.k) < 1:
        raise UserError(f"--k {min(arguments.k)}: must be at least 1")
    if (arguments.group_by is None) != (arguments.data is None):
        raise UserError("--group-by and --data go together; give both or neither")
    return arguments


def check_requests(arguments: argparse.Namespace, runs: Sequence[ScoredRun]) -> None:
    """Raises UserError where the files do not have what is asked for."""
    most = max(len(question.pooled) for run in runs for question in run.questions)
    if arguments.k and max(arguments.k) > most:
        found = f"no question has more than {counted(most, 'sample')}"
        raise UserError(f"--k {max(arguments.k)}: {found}; the largest possible k is {most}")
    tag = arguments.pass_tag
    if tag is None:
        return
    judged = [run for run in runs if not run.own_tags and run.tags != (None,)]
    several = [run for run in judged if len(run.tags) > 1]  # a file of one tag may stand beside those
    missing = [run for run in several or judged if tag not in run.tags]
    if missing and (several or len(missing) == len(judged)):
        where = f" in {missing[0].name}" if len(runs) > 1 else ""
        raise UserError(f"--pass-tag {tag}: tags in use{where} are {_tags_in_use(missing[0])}")
    if tag < 0:
        raise UserError(f"--pass-tag {tag}: must be at least 0")


def _tags_in_use(run: ScoredRun) -> str:
    tags = [tag for tag in run.tags if tag is not None]
    if len(tags) > 2 and tags[-1] - tags[0] == len(tags) - 1:
        return f"{tags[0]} to {tags[-1]}"
    return ", ".join(map(str, tags[:-1])) + (" and " if tags[:-1] else "") + str(tags[-1])


def main() -> None:
    """Parse, evaluate, write, print."""
    arguments = parse()
    runs = load_runs(arguments.scored)
    check_requests(arguments, runs)
    with ExitStack() as stack:
        by = arguments.group_by
        options = Options(
            protocol=arguments.protocol,
            ks=None if arguments.k is None else tuple(arguments.k),
            answers=arguments.answers,
            equivalent=stack.enter_context(MathEquivalence()) if arguments.answers == "math" else None,
            pass_tag=arguments.pass_tag or 0,
            group_by=by,
            groups=None if by is None else read_groups(arguments.data, by),
        )
        record = evaluate(runs, options)
    tables, remarks = all_tables(record), warnings(record)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_durably(arguments.output / "evaluation.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_durably(arguments.output / "tables.md", to_markdown(tables, remarks))
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output}: {error.strerror}; give another --output") from error
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for table in tables:
        console.print(to_rich(table), "")
    for remark in remarks:
        print(remark)
    print(f"figures: {arguments.output / 'evaluation.json'}, tables: {arguments.output / 'tables.md'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
