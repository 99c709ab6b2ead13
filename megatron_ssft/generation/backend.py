"""The contract of generation backends: requests in, generated samples out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from megatron_ssft.generation.requests import Failed, Generated, Origin, Request

Until = Callable[[Sequence[int]], bool]
"""Whether the tokens generated so far are enough."""


class Backend(Protocol):
    """Generates samples; the classes say the details."""

    @property
    def origin(self) -> Origin: ...

    @property
    def chunk_size(self) -> int:
        """Questions that are worth handing over together."""

    def load(self) -> None:
        """Get ready to generate, once. Raises UserError."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated | Failed]:
        """Yield the samples as they get done, each request exactly once. Raises UserError where no more can be made."""

    def greedy(self, requests: Sequence[Request], until: Until) -> Mapping[str, tuple[int, ...] | Failed]:
        """Map questions to greedy tokens up to where `until` became true of them; one request per question.

        Questions where that did not happen within the request's limit are left out. Raises UserError.
        """


def shortest_start(ids: tuple[int, ...], until: Until) -> tuple[int, ...] | None:
    """Cut `ids` where `until` becomes true of them; None if it never does."""
    return next((ids[:length] for length in range(1, len(ids) + 1) if until(ids[:length])), None)
