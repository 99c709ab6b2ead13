"""assignments.jsonl: one line per question and step, which tag each trace got and the costs it was chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import REPAIR, Count, RowError, read_rows
from megatron_ssft.formats.metrics import NO_RUN
from megatron_ssft.records import Assignment, QuestionBatch

ASSIGNMENTS = "assignments.jsonl"
_MATRIX = "a matrix, a row for each tag and a column for each trace"


class AssignmentRow(Struct, frozen=True, kw_only=True):
    """One line: one use of one question with M traces."""

    iteration: Count
    epoch: Count
    """0-based."""
    id: Annotated[str, Meta(description="a string")]
    tags: Annotated[list[Count], Meta(min_length=1, description="a list of whole numbers from 0, one per trace")]
    """[M], 0-based rows of `cost`: tag k is written <think{k+1}>."""
    sources: Annotated[list[str | None] | None, Meta(description="a list with a name or null for each tag")] = None
    """[M]"""
    cost: Annotated[list[list[float]] | None, Meta(description=_MATRIX)] = None
    """[N][M], nats, rounded to six digits; null where no costs were evaluated."""

    def check(self) -> None:
        """Raise RowError where lists that belong together differ in length."""
        if self.sources is not None and len(self.sources) != len(self.tags):
            raise RowError("'sources' must hold a name or null for each tag")
        if self.cost is not None:
            widths = {len(row) for row in self.cost}
            if widths != {len(self.tags)} or len(self.cost) <= max(self.tags):
                raise RowError(f"'cost' must be {_MATRIX}")


def source_labels(sources: Sequence[str | None]) -> tuple[str, ...]:
    """Source of each trace; `trace j`, the slot counted from 1, where it is unknown."""
    return tuple(f"trace {slot}" if source is None else source for slot, source in enumerate(sources, start=1))


@dataclass(frozen=True)
class Visit:
    """One use of one question, as the reports and the statistics of matchings use it."""

    iteration: int
    epoch: int
    """0-based."""
    id: str
    tags: tuple[int, ...]
    """0-based tag of each of the M traces."""
    sources: tuple[str | None, ...]
    """Source of each trace."""
    cost_NM: np.ndarray | None = None
    """float64 [N, M], nats; None where no costs were evaluated."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Source of each trace; `trace j` (from 1) stands in where it is unknown."""
        return source_labels(self.sources)


def assignment_rows(iteration: int, batch: QuestionBatch, assignments: list[Assignment]) -> Iterator[AssignmentRow]:
    """The lines of one step."""
    for visit, tokenized, assignment in zip(batch.visits, batch.sets, assignments):
        cost = None if assignment.cost_NM is None else [[round(float(c), 6) for c in row] for row in assignment.cost_NM]
        yield AssignmentRow(
            iteration=iteration,
            epoch=visit.epoch,
            id=tokenized.id,
            tags=[int(tag) for tag in assignment.tags],
            sources=list(tokenized.sources),
            cost=cost,
        )


def load_assignments(folder: str | Path) -> list[Visit]:
    """Read `folder`/assignments.jsonl, in its order. A torn last line is skipped with a warning.

    Raises UserError for other bad lines.
    """
    path = Path(folder) / ASSIGNMENTS
    visits = []
    for number, row in read_rows(path, AssignmentRow, NO_RUN):
        try:
            row.check()
        except RowError as error:
            raise UserError(f"{path}:{number}: {error}; {REPAIR}") from error
        visits.append(_visit(row))
    return visits


def _visit(row: AssignmentRow) -> Visit:
    sources = tuple([None] * len(row.tags) if row.sources is None else row.sources)
    cost_NM = None if row.cost is None else np.array(row.cost, np.float64)
    return Visit(row.iteration, row.epoch, row.id, tuple(row.tags), sources, cost_NM)
