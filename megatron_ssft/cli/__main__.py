"""`python -m megatron_ssft.cli`: the console program without its script, as launchers need it."""

from __future__ import annotations

import sys

from megatron_ssft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
