"""Write the synthetic multi-teacher set of the demo: train.jsonl and heldout.jsonl in --output."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ssft.demo.data import write_demo_data
from megatron_ssft.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the two files")
    parser.add_argument("--seed", type=int, default=1234, help="decides every draw [%(default)s]")
    parser.add_argument("--train", type=int, default=2048, help="training questions [%(default)s]")
    parser.add_argument("--held-out", type=int, default=256, help="held-out questions [%(default)s]")
    parser.add_argument("--traces", type=int, default=4, help="traces a question, at most 6 [%(default)s]")
    args = parser.parse_args(argv)
    try:
        paths = write_demo_data(args.output, args.train, args.held_out, args.traces, args.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0
