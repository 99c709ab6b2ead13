"""Choose the tag for single answers: the door to `megatron-ssft select-tag` from a checkout."""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.select_tag import main

if __name__ == "__main__":
    sys.exit(run_command(main))
