"""Rewards of every question and tag, from `megatron-ssft score --rewards`: what a policy is trained on."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.jsonl import Count, RowError, convert_row, parse_object, to_line
from megatron_ssft.formats.rollouts import Mark, ScoredRollout

_AGAIN = "write the file again with megatron-ssft score --rewards"
_MOST = 2**53
"""Counts from here on are not exact as float64."""
Parsed = TypeVar("Parsed")
SampleCounts = Annotated[list[Count], Meta(description="a list of whole numbers from 0, one per tag")]
File = Annotated[str | None, Meta(description="the path of a file")]


class RewardLine(Struct, frozen=True, kw_only=True):
    """One line of the file: counts of one question, in the order of `tags`."""

    id: Annotated[str, Meta(pattern=r"\S", description="a string that is not empty")]
    tags: Annotated[list[Count], Meta(description="different whole numbers from 0")]
    """0-based."""
    n: SampleCounts
    """Samples under each tag."""
    sum: Annotated[list[Annotated[float, Meta(ge=0)]], Meta(description="a list of numbers from 0, one per tag")]
    """Sum of their rewards, each in [0, 1]."""
    truncated: SampleCounts
    """Samples that ended at their token limit."""
    unjudged: SampleCounts | UnsetType = UNSET
    """Samples that the verifier came to no verdict on, by time, memory or a crash of its own; counted in `n` with
    reward 0. Left out where there are none."""
    verifier: str = ""
    model: Annotated[str, Meta(description="a string")]
    """Fingerprint of the model that made the samples."""
    prompt: Mark | UnsetType = UNSET
    """`mark` of the prompt that the samples were made from, without the tag; absent in files of earlier versions."""
    rollouts: File | UnsetType = UNSET
    """The rollout file they were counted in, seen from this file's folder."""
    scores: File | UnsetType = UNSET
    """Its scores."""

    @property
    def mean_N(self) -> np.ndarray:
        """Mean reward of each of `tags`, float64; 0 without samples."""
        return np.asarray(self.sum, np.float64) / np.maximum(np.asarray(self.n, np.float64), 1.0)


@dataclass(frozen=True)
class RewardRow:
    """Counts of one question."""

    n_N: np.ndarray
    """float64: samples under each tag, all > 0."""
    sum_N: np.ndarray
    """float64: sum of their rewards, each in [0, 1]."""
    truncated_N: np.ndarray
    """float64: samples that ended at their token limit."""
    unjudged_N: np.ndarray
    """float64: samples that the verifier came to no verdict on, with reward 0."""
    line: int
    """1-based."""
    prompt: str | None = None
    """`mark` of the prompt that the samples were made from; None in files of earlier versions."""


@dataclass(frozen=True)
class RewardSource:
    """The origin of a file's rewards, the same in all its rows."""

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

    @property
    def unjudged(self) -> int:
        """All samples whose reward is 0 for want of a verdict."""
        return int(sum(row.unjudged_N.sum() for row in self.rows.values()))


# -- writing ---------------------------------------------------------------------------------------------------------


def is_unjudged(row: ScoredRollout) -> bool:
    """Whether the verifier itself ran out of time or memory, or crashed; of a program under test that is a verdict."""
    return row.verdict.startswith("crash: verifier") or (
        row.verifier != "code" and row.verdict in ("timeout", "memory")
    )


def count_rewards(
    scored: Sequence[ScoredRollout], rollouts: str | UnsetType = UNSET, scores: str | UnsetType = UNSET
) -> list[RewardLine]:
    """Count samples, correct ones and truncated ones per question and tag, in the order of the file.

    Samples without a tag are left out; a question that has no others has no line.
    """
    tags = sorted({row.tag for row in scored if row.tag is not None})
    by_question: dict[str, dict[int, list[ScoredRollout]]] = defaultdict(lambda: defaultdict(list))
    for row in scored:
        if row.tag is not None:
            by_question[row.id][row.tag].append(row)
    return [
        RewardLine(
            id=name,
            tags=tags,
            n=[len(of_tag[tag]) for tag in tags],
            sum=[sum(row.correct for row in of_tag[tag]) for tag in tags],
            truncated=[sum(row.truncated for row in of_tag[tag]) for tag in tags],
            unjudged=_unjudged([of_tag[tag] for tag in tags]),
            verifier=scored[0].verifier,
            model=scored[0].model,
            prompt=_prompt([row for rows in of_tag.values() for row in rows]),
            rollouts=rollouts,
            scores=scores,
        )
        for name, of_tag in by_question.items()
    ]


def _unjudged(rows_by_tag: Sequence[Sequence[ScoredRollout]]) -> list[int] | UnsetType:
    counts = [sum(map(is_unjudged, rows)) for rows in rows_by_tag]
    return counts if any(counts) else UNSET


def _prompt(samples: Sequence[ScoredRollout]) -> str | UnsetType:
    """The one prompt of a question's samples; unset where an earlier version left it out of some.

    A file with two under one id is refused when it is read.
    """
    prompts = {row.prompt for row in samples}
    return UNSET if len(prompts) > 1 or None in prompts else str(prompts.pop())


def write_rewards(path: Path, scored: Sequence[ScoredRollout], rollouts: Path, scores: Path) -> None:
    """Write the counts of `count_rewards`, whole or not at all. Raises UserError.

    Each line also says where the counted `rollouts` and `scores` stand, seen from the folder of `path`.
    """
    folder = path.parent.resolve()
    places = [os.path.relpath(file.resolve(), folder) for file in (rollouts, scores)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(map(to_line, count_rewards(scored, *places))))
    except OSError as error:
        raise UserError(f"{path}: cannot write the rewards: {reason_of(error)}; give another --rewards") from error


def without_signal(path: Path, questions: int) -> str:
    """One line on rewards that say nothing about the choice of a tag."""
    return (
        f"{path}: all of its {questions} questions have the same reward under every tag, so there is nothing to learn "
        "about their choice; give questions that some tags answer better than others, or more --samples-per-tag"
    )


# -- reading ---------------------------------------------------------------------------------------------------------


def read_rewards(path: Path, num_tags: int) -> RewardTable:
    """A rewards file. Raises UserError for a wrong row: each needs samples under every one of the N tags."""
    source, rows = _read(path, lambda row, line: _spread_counts(row, line, num_tags))
    return RewardTable(source.path, source.model, source.rollouts, source.scores, rows)


def read_reward_lines(path: Path) -> dict[str, RewardLine]:
    """The rows of a rewards file as they stand, by the question's id. Raises UserError for a wrong row."""
    return _read(path, lambda row, line: _checked(row))[1]


def read_source(path: Path) -> RewardSource:
    """Read the origin of a rewards file, whatever its counts are. Raises UserError."""
    return _read(path, lambda row, line: line)[0]


def _read(path: Path, parse: Callable[[RewardLine, int], Parsed]) -> tuple[RewardSource, dict[str, Parsed]]:
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
                if not raw.strip():
                    continue
                try:
                    row = _parse_line(raw)
                    own = (row.model, row.rollouts or None, row.scores or None)
                    if origin is not None and own != origin:
                        raise RowError("rewards of another model or other files than above; keep them apart")
                    origin = own
                    if first_use.setdefault(row.id, line) < line:
                        raise RowError(f"id {row.id!r} is already on line {first_use[row.id]}; {_AGAIN}")
                    rows[row.id] = parse(row, line)
                except RowError as error:
                    wrong.append(f"{path}:{line}: {error}")
    except OSError as error:
        raise UserError(f"{path}: cannot read the rewards: {error.strerror or error}; check the path") from error
    if wrong:
        raise UserError(wrong[0] + (f" ({len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""))
    if origin is None:
        raise UserError(f"{path}:1: the file is empty, as with samples that have no tag; {_AGAIN}")
    model, rollouts, scores = origin
    return RewardSource(path, model, _beside(path, rollouts), _beside(path, scores)), rows


def _beside(path: Path, name: str | None) -> Path | None:
    return None if name is None else path.parent / name


def _parse_line(raw: bytes) -> RewardLine:
    """One line. Raises RowError."""
    try:
        return convert_row(parse_object(raw), RewardLine)
    except RowError as error:
        if not raw.endswith(b"\n"):
            raise RowError(f"the file ends within this row; {_AGAIN}") from error
        raise RowError(f"{error}; {_AGAIN}") from error


def _checked(row: RewardLine) -> RewardLine:
    """The row itself, where each list has a number per tag. Raises RowError."""
    unjudged = row.n if row.unjudged is UNSET else row.unjudged
    for name, values in (("n", row.n), ("truncated", row.truncated), ("sum", row.sum), ("unjudged", unjudged)):
        _check_length(name, values, row.tags)
    return row


def _spread_counts(row: RewardLine, line: int, num_tags: int) -> RewardRow:
    """The counts of a line as arrays over all N tags. Raises RowError."""
    if len(set(row.tags)) < len(row.tags):
        raise RowError(f"'tags' must be different whole numbers from 0; {_AGAIN}")
    if max(row.tags, default=0) >= num_tags:
        raise RowError(f"tag {max(row.tags)} (0-based): the model has {num_tags}; these are another model's rewards")
    n_N = _spread("n", row.n, row.tags, num_tags)
    truncated_N = _spread("truncated", row.truncated, row.tags, num_tags)
    sum_N = _spread("sum", row.sum, row.tags, num_tags)
    unjudged = [0] * len(row.tags) if row.unjudged is UNSET else row.unjudged
    unjudged_N = _spread("unjudged", unjudged, row.tags, num_tags)
    if (sum_N > n_N).any() or (truncated_N > n_N).any() or (unjudged_N + sum_N > n_N).any():
        raise RowError(f"'sum', 'truncated' and 'unjudged' cannot be greater than 'n'; {_AGAIN}")
    missing = np.flatnonzero(n_N == 0)
    if len(missing):
        raise RowError(
            f"no samples under tag {missing[0]} (0-based), and the reward of every tag must be known: generate with "
            "--tags each, score all"
        )
    return RewardRow(n_N, sum_N, truncated_N, unjudged_N, line, row.prompt or None)


def _spread(name: str, values: Sequence[float], tags: list[int], num_tags: int) -> np.ndarray:
    """float64 [N] from a number for each of `tags`; 0 elsewhere. Raises RowError."""
    _check_length(name, values, tags)
    spread = np.zeros(num_tags)
    spread[tags] = values
    return spread


def _check_length(name: str, values: Sequence[float], tags: Sequence[int]) -> None:
    """Raise RowError unless there is a number, exact as float64, for each of `tags`."""
    if len(values) != len(tags) or not all(value < _MOST for value in values):
        kind = "numbers" if name == "sum" else "whole numbers"
        raise RowError(f"{name!r} must be {len(tags)} {kind} from 0, one per tag; {_AGAIN}")
