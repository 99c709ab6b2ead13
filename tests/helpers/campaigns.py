"""How much of a campaign of faults is tried: a seeded part in the suite, `SSFT_FAULTS` percent where that is set.

`make faults` sets 100, and shows what `tell` printed.
"""

from __future__ import annotations

import math
import os

PERCENT = int(os.environ.get("SSFT_FAULTS", 0))
"""0: the part that belongs to the suite."""


def cases(whole, part):
    """Cases to try of a campaign of `whole`, whose share in the suite is `part`."""
    return min(whole, math.ceil(whole * PERCENT / 100)) if PERCENT else part


def tell(campaign, tried, outcome):
    """One line for docs/reliability.md."""
    print(f"campaign: {campaign}: {tried} tried: {outcome}")
