"""Read a run's folder back: metrics.jsonl and assignments.jsonl as plain records, with statistics of the matchings.

A *configuration* is the set of edges between tags and sources chosen for one visit of a question. Some assignment is
the cheapest however small its margin, so counts of configurations ignore scale: read them beside the matching gap.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.matching.coverage import count_configurations, make_configuration

METRICS_FILE = "metrics.jsonl"
ASSIGNMENTS_FILE = "assignments.jsonl"

Configuration = tuple[tuple[int, str], ...]
"""Edges (0-based tag, source), sorted; one per trace."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by columns, in the file's order."""

    columns: dict[str, np.ndarray]
    """Key -> float64 [iterations]; NaN where a line has null or lacks the key. Keys without numbers are left out."""

    def __getitem__(self, key: str) -> np.ndarray:
        """Column `key`, all NaN if no line has it."""
        if key not in self.columns:
            return np.full(len(self), np.nan)
        return self.columns[key]

    def __len__(self) -> int:
        return len(self.columns["iteration"])


@dataclass(frozen=True)
class Visit:
    """One line of assignments.jsonl: one use of one question."""

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
        return tuple(f"trace {j}" if s is None else s for j, s in enumerate(self.sources, start=1))


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
    """The run saved in `folder`, called `name` (default: the folder's name). Raises UserError."""
    folder = Path(folder)
    return Run(name or folder.resolve().name, load_metrics(folder), tuple(load_assignments(folder)))


def load_metrics(folder: str | Path) -> Metrics:
    """`folder`/metrics.jsonl. A torn last line is skipped with a warning; other bad lines raise UserError."""
    path = Path(folder) / METRICS_FILE
    rows = []
    for number, row in read_objects(path):
        if not _is_count(row.get("iteration")):
            raise UserError(f"{path}:{number}: `iteration` must be a number from 0; repair or remove the line")
        rows.append(row)
    keys = {key: None for row in rows for key, value in row.items() if _is_number(value)} | {"iteration": None}
    return Metrics(
        {k: np.array([row[k] if _is_number(row.get(k)) else np.nan for row in rows], np.float64) for k in keys}
    )


def load_assignments(folder: str | Path) -> list[Visit]:
    """`folder`/assignments.jsonl, in its order. A torn last line is skipped with a warning; others raise UserError."""
    path = Path(folder) / ASSIGNMENTS_FILE
    return [_visit(f"{path}:{number}", row) for number, row in read_objects(path)]


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(1-based line, object) of a JSON-lines file; a killed writer may have left its last line unfinished.

    Raises UserError for any other line that is no object.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read the run: {error.strerror}; give the folder a run was saved in") from error
    with file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                if not line.endswith(b"\n"):
                    _log.warning("%s:%d: last line is unfinished and was ignored", path, number)
                    return
                raise UserError(f"{path}:{number}: not valid JSON ({error}); repair or remove the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object; repair or remove the line")
            yield number, row


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _visit(where: str, row: dict[str, object]) -> Visit:
    """The record of one line, `where` = file:line. Raises UserError."""

    def refused(reason: str) -> UserError:
        return UserError(f"{where}: {reason}; repair or remove the line")

    iteration, epoch, id = row.get("iteration"), row.get("epoch"), row.get("id")
    if not _is_count(iteration):
        raise refused("`iteration` must be a number from 0")
    if not _is_count(epoch):
        raise refused("`epoch` must be a number from 0")
    if not isinstance(id, str):
        raise refused("`id` must be a string")
    tags, sources, cost = row.get("tags"), row.get("sources"), row.get("cost")
    if not isinstance(tags, list) or not tags or not all(map(_is_count, tags)):
        raise refused("`tags` must be a list of numbers")
    sources = [None] * len(tags) if sources is None else sources
    if (
        not isinstance(sources, list)
        or len(sources) != len(tags)
        or not all(isinstance(s, str | None) for s in sources)
    ):
        raise refused("`sources` must hold a name or null for each tag")
    if cost is None:
        return Visit(iteration, epoch, id, tuple(tags), tuple(sources))
    if not isinstance(cost, list) or len(cost) <= max(tags) or not all(_is_row(r, len(tags)) for r in cost):
        raise refused("`cost` must be a matrix, a row for each tag and a column for each trace")
    return Visit(iteration, epoch, id, tuple(tags), tuple(sources), np.array(cost, np.float64))


def _is_row(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(_is_number, value))


def configuration(visit: Visit) -> Configuration:
    """The edges tag <-> source of one visit, sorted by tag; the order of the traces does not matter."""
    return make_configuration(visit.tags, visit.sources)


def whole_epochs(visits: Sequence[Visit]) -> list[int]:
    """Epochs with as many visits as the fullest one, ascending; counts in a part of an epoch do not compare."""
    sizes = Counter(v.epoch for v in visits)
    return sorted(epoch for epoch, size in sizes.items() if size == max(sizes.values()))


def configuration_counts(visits: Sequence[Visit]) -> dict[int, Counter[Configuration]]:
    """Epoch (ascending) -> how often each configuration was chosen in it."""
    return count_configurations(visits)


def distinct_configurations(visits: Sequence[Visit]) -> dict[int, int]:
    """Epoch (ascending) -> number of different configurations chosen in it."""
    return {epoch: len(counts) for epoch, counts in configuration_counts(visits).items()}


def tag_source_counts(
    visits: Sequence[Visit], epoch: int, num_tags: int | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """How often each tag got each source in `epoch`: int64 [N, sources], and the sources' names.

    Sources come in alphabetical order and are those of all epochs, so tables of different epochs line up.
    """
    names = tuple(sorted({label for v in visits for label in v.labels}))
    column = {name: k for k, name in enumerate(names)}
    rows = max((max(v.tags) + 1 for v in visits), default=0) if num_tags is None else num_tags
    counts = np.zeros((rows, len(names)), np.int64)
    for visit in visits:
        if visit.epoch == epoch:
            for tag, label in zip(visit.tags, visit.labels):
                counts[tag, column[label]] += 1
    return counts, names


def mutual_information_bits(counts: np.ndarray) -> float:
    """I(row; column) in bits of the joint frequencies `counts` [rows, columns]; NaN if there are none.

    0 when the tag says nothing about the source, at most log2(min(rows, columns)).
    """
    total = counts.sum()
    if total == 0:
        return float("nan")
    joint = counts / total
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    positive = joint > 0
    return float((joint[positive] * np.log2(joint[positive] / independent[positive])).sum())


def gap_by_iteration(metrics: Metrics) -> tuple[np.ndarray, np.ndarray]:
    """Iterations (int64) at which the matching gap was evaluated, and the gaps in nats per question (float64).

    The matching gap is the mean cost over all assignments minus that of the optimal one (equations 3-4), averaged over
    the step's questions.
    """
    gaps = metrics["matching_gap"]
    evaluated = np.isfinite(gaps)
    return metrics["iteration"][evaluated].astype(np.int64), gaps[evaluated]


def final_mean(values: np.ndarray, last: int = 16) -> float:
    """Mean of the last `last` finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite[-last:].mean()) if len(finite) else float("nan")
