"""Processor time of a call, whatever else the machine does."""

from __future__ import annotations

import time


def quickest(call, enough, tries=12):
    """What `call()` returned, and the least seconds of processor time that it took; no more tries than needed.

    Other programs slow a call down through the caches, so a slow one says little; `enough` seconds end the search.
    """
    least = float("inf")
    for _ in range(tries):
        start = time.process_time()
        result = call()
        least = min(least, time.process_time() - start)
        if least < enough:
            break
    return result, least
