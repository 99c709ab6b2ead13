"""Select the tag for single answers (pass@1): g*, which covers most of what the matching learned.

    megatron-ssft select-tag RUN
    megatron-ssft select-tag RUN --by accuracy --scored scored.jsonl

RUN is the folder of a training run. Equation 6 of the paper (section 2.3, appendix A.2) defines g*. Scored rollouts
found as RUN/eval/*.jsonl are used where none are given. Tags are written <think1>, <think2>, ...; with --json they
are numbers from 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag
from megatron_ssft.evaluation.tag_selection import as_json, select, show


@dataclass(frozen=True, kw_only=True)
class SelectTagFlags:
    """The run, and the rule that ranks its tags."""

    run: Annotated[Path, Flag(metavar="RUN", positional=True)]
    """Folder of a training run."""
    by: Literal["coverage", "accuracy"] = "coverage"
    """coverage (g*, of the assignments in training) or accuracy (of scored rollouts)."""
    scored: Annotated[tuple[Path, ...], Flag(metavar="S.jsonl")] = ()
    """Scored rollouts."""
    tolerance: Annotated[float, Flag(metavar="SD", infinite=True)] = 2.0
    """Drop configurations whose share fell by more than so many standard deviations."""
    min_count: Annotated[int, Flag(metavar="N")] = 1
    """And only if chosen at least so often in the last epoch."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        legal = self.tolerance >= 0 and self.min_count >= 1
        require(legal, "--tolerance must not be negative and --min-count must be at least 1")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, select, print. Raises UserError."""
    flags = parse_options(SelectTagFlags, __doc__, argv, prog)
    selection = select(flags.run, flags.by, flags.scored, flags.tolerance, flags.min_count)
    if flags.json:
        print(json.dumps(as_json(selection), indent=1))
    else:
        show(selection, flags.by, Console(width=None if sys.stdout.isatty() else 100))
