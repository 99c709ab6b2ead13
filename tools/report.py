"""Write a report on one or several training runs: one HTML page that opens offline, and its pictures as PNG files.

    python tools/report.py RUN [RUN2 ...] --output report.html
    python tools/report.py RUN [RUN2 ...] --eval DIR --output report.html --png-dir figures
    python tools/report.py RUN_GFPO [RUN ...] --policy-eval DIR --output report.html

RUN is the folder of a training run (--save) of SSFT or GFPO, DIR the output folder of tools/evaluate.py or, for
--policy-eval, of tools/evaluate_policy.py. Runs are called by their folders' names, evaluated ones as in
DIR/evaluation.json; equal names are drawn in equal colours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--eval", type=Path, metavar="DIR", help="made by tools/evaluate.py")
    parser.add_argument("--policy-eval", type=Path, metavar="DIR", help="made by tools/evaluate_policy.py")
    parser.add_argument(
        "--data", type=Path, metavar="H.jsonl", help="questions of GFPO runs, to show tags by a field [--policy-eval's]"
    )
    parser.add_argument("--group-by", metavar="FIELD", help="field of --data")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument("--png-dir", type=Path, metavar="DIR", help="[beside the page, <its name>_figures]")
    args = parser.parse_args(argv)
    if (args.group_by is None) != (args.data is None):
        raise UserError("--group-by and --data go together; give both or neither")
    from megatron_ssft.evaluation.scored_runs import read_groups
    from megatron_ssft.report.page.report import write_report

    groups = None if args.data is None else read_groups(args.data, args.group_by)
    page, *pictures = write_report(args.runs, args.output, args.eval, args.png_dir, args.policy_eval, groups)
    print(f"report: {page}")
    if pictures:
        print(f"pictures: {len(pictures)} in {pictures[0].parent}")


if __name__ == "__main__":
    sys.exit(run_command(main))
