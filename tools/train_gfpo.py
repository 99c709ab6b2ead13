"""Learn which forking token to choose: the door to `megatron-ssft gfpo` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.gfpo import main

if __name__ == "__main__":  # checkpoint writers start helper processes that import this module again
    sys.exit(run_command(main))
