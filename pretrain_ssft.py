"""Train a GPT by Set Supervised Fine-Tuning: the door to `megatron-ssft train` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.train import main

if __name__ == "__main__":  # checkpoint writers start helper processes that import this module again
    sys.exit(run_command(main))
