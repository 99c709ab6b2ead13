"""Whether a training run lives, from its heartbeat.json: one line, and an exit status for scripts.

    megatron-ssft status RUN

Exit status: 0 alive, done, or stopped by SIGTERM; 3 stuck (silent, or without progress for longer than it may be);
4 failed; 2 no heartbeat can be read. It can be asked on any machine that sees the folder. That a process was killed is
known at once on its own machine, and elsewhere shows as a minute of silence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.fields import Flag
from megatron_ssft.formats.heartbeat import judge, read_heartbeat

STATUS = {"alive": 0, "done": 0, "stopped": 0, "stuck": 3, "failed": 4}
"""Exit statuses by what is found."""


@dataclass(frozen=True, kw_only=True)
class StatusFlags:
    """The run to look at."""

    run: Annotated[Path, Flag(metavar="RUN", positional=True)]
    """Folder of a training run."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse, look, print; the exit status. Raises UserError."""
    flags = parse_options(StatusFlags, __doc__, argv, prog)
    finding = judge(read_heartbeat(flags.run), time.time())
    print(finding.text)
    return STATUS[finding.state]
