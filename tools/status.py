"""Whether a training run lives: the door to `megatron-ssft status` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.status import main

if __name__ == "__main__":
    sys.exit(run_command(main))
