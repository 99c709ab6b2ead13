"""Write the demo's data: the door to `megatron-ssft demo-data` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.demo_data import main
from megatron_ssft.cli.entry import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
