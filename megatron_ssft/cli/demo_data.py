"""Write the synthetic multi-teacher set of the demo: train.jsonl and heldout.jsonl in --output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.fields import Flag
from megatron_ssft.demo.data import write_demo_data


@dataclass(frozen=True, kw_only=True)
class DemoDataFlags:
    """Folder and size of the set."""

    output: Annotated[Path, Flag(metavar="DIR")]
    """Folder for the two files."""
    seed: int = 1234
    """Decides every draw."""
    train: int = 2048
    """Training questions."""
    held_out: int = 256
    """Held-out questions."""
    traces: int = 4
    """Traces per question, at most 6."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, write, say where. Raises UserError."""
    flags = parse_options(DemoDataFlags, __doc__, argv, prog)
    for path in write_demo_data(flags.output, flags.train, flags.held_out, flags.traces, flags.seed):
        print(path)
