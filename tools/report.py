"""Write a report on training runs: the door to `megatron-ssft report` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.report import main

if __name__ == "__main__":
    sys.exit(run_command(main))
