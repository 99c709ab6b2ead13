"""Write a report on one or several training runs: one HTML page that opens offline, and its pictures as PNG files.

    python tools/report.py RUN [RUN2 ...] --output report.html
    python tools/report.py RUN [RUN2 ...] --eval DIR --output report.html --png-dir figures

RUN is the folder of a training run (--save), DIR the output folder of tools/evaluate.py. Runs are called by their
folders' names, evaluated ones as in DIR/evaluation.json; equal names are drawn in equal colours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ssft.cli import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--eval", type=Path, metavar="DIR", help="made by tools/evaluate.py")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument("--png-dir", type=Path, metavar="DIR", help="[beside the page, <its name>_figures]")
    args = parser.parse_args(argv)
    from megatron_ssft.report.report import write_report

    page, *pictures = write_report(args.runs, args.output, args.eval, args.png_dir)
    print(f"report: {page}")
    if pictures:
        print(f"pictures: {len(pictures)} in {pictures[0].parent}")


if __name__ == "__main__":
    sys.exit(run_command(main))
