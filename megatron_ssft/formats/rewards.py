"""Rewards of every question and tag, as score.py --rewards writes them: what a forking policy is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_ssft.data.jsonl import RowError, filled_string, kind_of, parse_json
from megatron_ssft.errors import UserError

_AGAIN = "write the file again with score.py --rewards"
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class RewardRow:
    """Counts of one question."""

    n_N: np.ndarray
    """float64: samples under each tag, all > 0."""
    sum_N: np.ndarray
    """float64: sum of their rewards, each in [0, 1]."""
    truncated_N: np.ndarray
    """float64: samples that ended at their token limit."""
    line: int
    """1-based."""


@dataclass(frozen=True)
class RewardSource:
    """What the rewards of a file were made from, the same in all its rows."""

    path: Path
    """The rewards file."""
    model: str
    """Fingerprint of the model that made the samples."""
    rollouts: Path | None
    """The rollout file they were counted in, where the rewards say it. It need not be there."""
    scores: Path | None
    """Its scores."""


@dataclass(frozen=True)
class RewardTable(RewardSource):
    """A rewards file."""

    rows: dict[str, RewardRow]
    """By the question's id."""


def read_rewards(path: Path, num_tags: int) -> RewardTable:
    """A rewards file. Raises UserError for a wrong row: each needs samples under every one of the N tags."""
    source, rows = _read(path, lambda row, line: _parse_counts(row, line, num_tags))
    return RewardTable(source.path, source.model, source.rollouts, source.scores, rows)


def read_source(path: Path) -> RewardSource:
    """What a rewards file says of its samples, whatever its counts are. Raises UserError."""
    return _read(path, lambda row, line: line)[0]


def _read(path: Path, parse: Callable[[dict[str, object], int], Parsed]) -> tuple[RewardSource, dict[str, Parsed]]:
    """The common origin of all rows, and what `parse(row, line)` makes of each, by its question's id.

    A program writes these files, so what is wrong with one row is mostly wrong with all: the UserError shows the first
    and says how many there are.
    """
    wrong: list[str] = []
    rows: dict[str, Parsed] = {}
    first_use: dict[str, int] = {}
    origin: tuple[str, str | None, str | None] | None = None
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    if not raw.strip():
                        continue
                    row, found = _parse_origin(raw)
                    if origin is not None and found != origin:
                        raise RowError("rewards of another model or other files than above; keep them apart")
                    origin = found
                    name = filled_string(row.get("id"), "'id'")
                    if first_use.setdefault(name, line) < line:
                        raise RowError(f"id {name!r} is already on line {first_use[name]}; {_AGAIN}")
                    rows[name] = parse(row, line)
                except RowError as error:
                    wrong.append(f"{path}:{line}: {error}")
    except OSError as error:
        raise UserError(f"{path}: cannot read the rewards: {error.strerror or error}; check the path") from error
    if wrong:
        raise UserError(wrong[0] + (f" ({len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""))
    if origin is None:
        raise UserError(f"{path}:1: the file is empty, as with samples that have no tag; {_AGAIN}")
    model, *named = origin
    return RewardSource(path, model, *(None if name is None else path.parent / name for name in named)), rows


def _parse_origin(raw: bytes) -> tuple[dict[str, object], tuple[str, str | None, str | None]]:
    """A row and its (model, rollouts, scores). Raises RowError."""
    try:
        row = parse_json(raw)
    except RowError as error:
        if not raw.endswith(b"\n"):
            raise RowError(f"the file ends within this row; {_AGAIN}") from error
        raise RowError(f"{error}; {_AGAIN}") from error
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {kind_of(row)}; {_AGAIN}")
    if not isinstance(row.get("model"), str):
        raise RowError(f"'model' must be a string; {_AGAIN}")
    for name in ("rollouts", "scores"):
        if not isinstance(row.get(name), str | None):
            raise RowError(f"{name!r} must be the path of a file; {_AGAIN}")
    return row, (row["model"], row.get("rollouts"), row.get("scores"))


def _parse_counts(row: dict[str, object], line: int, num_tags: int) -> RewardRow:
    """The counts of a row. Raises RowError."""
    tags = row.get("tags")
    if not isinstance(tags, list) or not all(type(t) is int and t >= 0 for t in tags) or len(set(tags)) < len(tags):
        raise RowError(f"'tags' must be different whole numbers from 0; {_AGAIN}")
    if max(tags, default=0) >= num_tags:
        raise RowError(f"tag {max(tags)} (0-based): the model has {num_tags}; these are another model's rewards")
    n_N, truncated_N = (_spread(row, name, tags, num_tags, (int,)) for name in ("n", "truncated"))
    sum_N = _spread(row, "sum", tags, num_tags, (int, float))
    if (sum_N > n_N).any() or (truncated_N > n_N).any():
        raise RowError(f"'sum' and 'truncated' cannot be greater than 'n'; {_AGAIN}")
    missing = np.flatnonzero(n_N == 0)
    if len(missing):
        raise RowError(
            f"no samples under tag {missing[0]} (0-based), and the reward of every tag must be known: generate with "
            "--tags each, score all"
        )
    return RewardRow(n_N, sum_N, truncated_N, line)


def _spread(row: dict[str, object], name: str, tags: list[int], num_tags: int, kinds: tuple[type, ...]) -> np.ndarray:
    """float64 [N] from a field with a number for each of `tags`; 0 elsewhere. Raises RowError."""
    values = row.get(name)
    if (
        not isinstance(values, list)
        or len(values) != len(tags)
        or not all(type(v) in kinds and 0 <= v < 2**53 for v in values)
    ):
        kind = "whole numbers" if kinds == (int,) else "numbers"
        raise RowError(f"{name!r} must be {len(tags)} {kind} from 0, one a tag; {_AGAIN}")
    spread = np.zeros(num_tags)
    spread[tags] = values
    return spread
