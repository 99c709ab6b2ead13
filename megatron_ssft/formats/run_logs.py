"""A training run read back from its folder: metrics.jsonl by columns, assignments.jsonl as visits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.formats.assignments import Visit, load_assignments
from megatron_ssft.formats.metrics import Metrics, load_metrics


@dataclass(frozen=True)
class Run:
    """One run, as the reports use it."""

    name: str
    metrics: Metrics
    visits: tuple[Visit, ...]

    @property
    def num_tags(self) -> int:
        """Rows of the cost matrices where there are any, else the highest tag in use."""
        rows = (len(v.cost_NM) if v.cost_NM is not None else max(v.tags) + 1 for v in self.visits)
        return max(rows, default=0)


def load_run(folder: str | Path, name: str | None = None) -> Run:
    """Read the run saved in `folder` and call it `name` (default: the folder's name). Raises UserError."""
    folder = Path(folder)
    return Run(name or folder.resolve().name, load_metrics(folder), tuple(load_assignments(folder)))
