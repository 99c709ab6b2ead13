"""Which forking token to use for single answers (pass@1): g*, the one that covers most of what the matching learned.

    python tools/select_tag.py RUN
    python tools/select_tag.py RUN --by accuracy --scored scored.jsonl

RUN is the folder of a training run. Scored rollouts found as RUN/eval/*.jsonl are used where none are given. Tags are
written <think1>, <think2>, ...; with --json they are numbers from 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.tag_selection import as_json, select, show


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, select, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--by", choices=("coverage", "accuracy"), default="coverage", help="[%(default)s]")
    parser.add_argument("--scored", type=Path, nargs="+", default=[], metavar="S.jsonl", help="scored rollouts")
    parser.add_argument(
        "--tolerance", type=float, default=2.0, metavar="SD",
        help="drop configurations whose share fell by more than so many standard deviations [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--min-count", type=int, default=1, metavar="N",
        help="and only if chosen at least so often in the last epoch [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if not args.tolerance >= 0 or args.min_count < 1:
        raise UserError("--tolerance must not be negative and --min-count must be at least 1")
    selection = select(args.run, args.by, args.scored, args.tolerance, args.min_count)
    if args.json:
        print(json.dumps(as_json(selection), indent=1))
    else:
        show(selection, args.by, Console(width=None if sys.stdout.isatty() else 100))
