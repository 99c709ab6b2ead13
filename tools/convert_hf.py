"""Convert checkpoints: the door to `megatron-ssft convert` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.convert import main
from megatron_ssft.cli.entry import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
