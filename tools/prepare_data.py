"""Make questions and training sets: the door to `megatron-ssft prepare-data` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(run_command(main))
