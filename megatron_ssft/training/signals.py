"""A clean stop on SIGTERM: finish the step, save, exit 0."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Remembers that SIGTERM arrived. Ranks may get it at different steps; the loop agrees with a collective."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
