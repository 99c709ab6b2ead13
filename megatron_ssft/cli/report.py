"""Write a report on one or several training runs: one HTML page that opens offline, and its pictures as PNG files.

    megatron-ssft report RUN [RUN2 ...] --output report.html
    megatron-ssft report RUN [RUN2 ...] --eval DIR --output report.html --png-dir figures
    megatron-ssft report RUN_GFPO [RUN ...] --policy-eval DIR --output report.html

RUN is the folder of a training run (--save) of SSFT or GFPO. DIR is the output folder of `evaluate` or, for
--policy-eval, of `evaluate-policy`. Runs are called by their folders' names, evaluated ones as in
DIR/evaluation.json; equal names are drawn in equal colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Runs and evaluations of the report, and its files."""

    runs: Annotated[tuple[Path, ...], Flag(metavar="RUN", positional=True)]
    """Folder of a training run."""
    eval: Annotated[Path | None, Flag(metavar="DIR")] = None
    """Folder made by `evaluate`."""
    policy_eval: Annotated[Path | None, Flag(metavar="DIR")] = None
    """Folder made by `evaluate-policy`."""
    data: Annotated[Path | None, Flag(metavar="H.jsonl")] = None
    """Questions of GFPO runs, to show tags by a field; default: those of --policy-eval."""
    group_by: Annotated[str | None, Flag(metavar="FIELD")] = None
    """Field of --data."""
    output: Annotated[Path, Flag(metavar="FILE")]
    """The page, such as report.html."""
    png_dir: Annotated[Path | None, Flag(metavar="DIR")] = None
    """Folder of the pictures; default: beside the page, <its name>_figures."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        together = (self.group_by is None) == (self.data is None)
        require(together, "--group-by and --data go together; give both or neither")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, write, say where. Raises UserError."""
    flags = parse_options(ReportFlags, __doc__, argv, prog)
    from megatron_ssft.evaluation.scored_runs import read_groups
    from megatron_ssft.report.page.report import write_report

    groups = None
    if flags.data is not None and flags.group_by is not None:
        groups = read_groups(flags.data, flags.group_by)
    page, *pictures = write_report(flags.runs, flags.output, flags.eval, flags.png_dir, flags.policy_eval, groups)
    print(f"report: {page}")
    if pictures:
        print(f"pictures: {len(pictures)} in {pictures[0].parent}")
