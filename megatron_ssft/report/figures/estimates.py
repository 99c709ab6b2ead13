"""How an estimate is written in words and tables."""

from __future__ import annotations

from typing import Protocol


class Measured(Protocol):
    """A value with its standard error."""

    @property
    def value(self) -> float: ...

    @property
    def stderr(self) -> float | None: ...


def show(estimate: Measured | None, signed: bool = False) -> str:
    """`0.512 ±0.020`, with a sign where it is a difference; `-` where there is no estimate."""
    if estimate is None:
        return "-"
    value = f"{estimate.value:+.3f}" if signed else f"{estimate.value:.3f}"
    return value if estimate.stderr is None else f"{value} ±{estimate.stderr:.3f}"
