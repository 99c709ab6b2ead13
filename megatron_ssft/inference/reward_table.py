"""Rewards of every question and tag, as score.py --rewards writes them: what a forking policy is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ssft.data.jsonl import RowError, WrongRows, parse_json
from megatron_ssft.errors import UserError


@dataclass(frozen=True)
class RewardRow:
    """Counts of one question."""

    n_N: np.ndarray
    """float64: samples under each tag."""
    sum_N: np.ndarray
    """float64: sum of their rewards."""
    truncated_N: np.ndarray
    """float64: samples that ended at their token limit."""
    line: int
    """1-based."""


@dataclass(frozen=True)
class RewardTable:
    """A rewards file."""

    path: Path
    rows: dict[str, RewardRow]
    """By the question's id."""
    model: str
    """Fingerprint of the model that made the samples."""
    rollouts: Path | None
    """The rollout file they were counted in, where the rewards say it."""
    scores: Path | None
    """Its scores."""


def read_rewards(path: Path, num_tags: int) -> RewardTable:
    """A rewards file. Raises one UserError for all wrong rows: each needs samples under every one of the N tags."""
    wrong = WrongRows()
    rows: dict[str, RewardRow] = {}
    origins: dict[tuple, int] = {}
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    row = parse_json(raw)
                    name, parsed = _parse(row, line, num_tags)
                    if name in rows:
                        raise RowError(f"id {name!r} is already on line {rows[name].line}")
                    rows[name] = parsed
                    origins.setdefault((row["model"], row.get("rollouts"), row.get("scores")), line)
                except RowError as error:
                    wrong.add(path, line, error)
    except OSError as error:
        wrong.add_unreadable(path, error)
    wrong.raise_if_any()
    if not rows:
        raise UserError(f"{path}:1: the file is empty; write it with score.py --rewards")
    if len(origins) > 1:
        raise UserError(f"{path}:{max(origins.values())}: rewards of another model or file than those above it")
    ((model, rollouts, scores),) = origins
    beside = [None if name is None else path.parent / name for name in (rollouts, scores)]
    return RewardTable(path, rows, model, *beside)


def _parse(row: object, line: int, num_tags: int) -> tuple[str, RewardRow]:
    """(id, counts) of a row. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("expected a JSON object")
    if not isinstance(row.get("id"), str) or not isinstance(row.get("model"), str):
        raise RowError("'id' and 'model' must be strings; write the file with score.py --rewards")
    for name in ("rollouts", "scores"):
        if not isinstance(row.get(name), str | None):
            raise RowError(f"{name!r} must be the path of a file")
    tags = row.get("tags")
    if not isinstance(tags, list) or not all(type(t) is int and t >= 0 for t in tags) or len(set(tags)) < len(tags):
        raise RowError("'tags' must be different whole numbers from 0")
    if max(tags, default=0) >= num_tags:
        raise RowError(f"tag {max(tags)}: the model has {num_tags}; these are another model's rewards")
    counts = {}
    for name in ("n", "sum", "truncated"):
        values = row.get(name)
        finite = isinstance(values, list) and all(type(v) in (int, float) and 0 <= v < float("inf") for v in values)
        if not finite or len(values) != len(tags):
            raise RowError(f"{name!r} must be {len(tags)} numbers from 0, one a tag")
        counts[name] = np.zeros(num_tags)
        counts[name][tags] = values
    if (counts["sum"] > counts["n"]).any() or (counts["truncated"] > counts["n"]).any():
        raise RowError("'sum' and 'truncated' cannot be greater than 'n'")
    missing = np.flatnonzero(counts["n"] == 0)
    if len(missing):
        raise RowError(
            f"no samples under tag {missing[0]} (0-based); the reward of every tag must be known: "
            "generate with --tags each"
        )
    return row["id"], RewardRow(counts["n"], counts["sum"], counts["truncated"], line)
