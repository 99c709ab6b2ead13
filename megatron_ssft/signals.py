"""A clean stop: SIGTERM is remembered, and whoever asks finishes what is under way, saves and ends.

`training/trainer.py: Trainer.run` asks before every step.
"""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Remembers the first signal to stop.

    Ranks of a job may get it at different steps; the training loop agrees on it with a collective.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        """`numbers`: the signals that mean it; default: SIGTERM."""
        self.number = 0
        """0: none has come."""
        for number in numbers or (signal.SIGTERM,):
            signal.signal(number, self._receive)

    @property
    def received(self) -> bool:
        """Whether one has come."""
        return bool(self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
