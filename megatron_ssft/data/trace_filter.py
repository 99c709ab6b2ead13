"""`--trace-filter`: which traces of the data are used."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.errors import UserError
from megatron_ssft.records import Trace

_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class TraceFilter:
    """Conditions that a trace must all meet; None means no condition. A trace without the field does not match."""

    correct: bool | None = None
    """Required value of the trace's `correct`."""
    sources: tuple[str, ...] | None = None
    """Allowed values of the trace's `source`, sorted."""

    def matches(self, trace: Trace) -> bool:
        """Whether `trace` is kept."""
        if self.correct is not None and trace.correct is not self.correct:
            return False
        return self.sources is None or trace.source in self.sources

    def __str__(self) -> str:
        parts = [] if self.correct is None else [f"correct={str(self.correct).lower()}"]
        if self.sources is not None:
            parts.append("source=" + "|".join(self.sources))
        return ",".join(parts)


def parse_trace_filter(text: str) -> TraceFilter:
    """`correct=true,source=human|tora` to a TraceFilter.

    Raises UserError, one line that starts with `--trace-filter`, for unknown or repeated keys, missing values and a
    `correct` that is not true or false.
    """
    correct: bool | None = None
    sources: tuple[str, ...] | None = None
    keys = set()
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in ("correct", "source"):
            raise UserError(
                f"--trace-filter {text!r}: unknown key {key!r}; the keys are correct and source, "
                "as in correct=true,source=human|tora"
            )
        if key in keys:
            raise UserError(f"--trace-filter {text!r}: {key!r} is given twice; separate alternatives with |")
        keys.add(key)
        values = [alternative.strip() for alternative in value.split("|")]
        if not equals or not all(values):
            raise UserError(f"--trace-filter {text!r}: {key!r} has an empty value; write {key}=VALUE")
        if key == "source":
            sources = tuple(sorted(set(values)))
        elif value.lower() not in _BOOLEANS:
            raise UserError(f"--trace-filter {text!r}: correct must be true or false, not {value!r}")
        else:
            correct = _BOOLEANS[value.lower()]
    return TraceFilter(correct, sources)
