"""Scored files as runs of questions, their samples laid out by tag."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ssft.boxed import last_boxes
from megatron_ssft.data.questions import mark_of_row
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.voting import interleaved
from megatron_ssft.formats.rollouts import OWN_MODES, ScoredRollout, read_scored


@dataclass(frozen=True)
class Question:
    """One question's samples."""

    id: str
    by_tag: tuple[tuple[ScoredRollout, ...], ...]
    """N lists in the order of the run's tags, each in the order of its samples; empty where a tag has none."""
    pooled: tuple[ScoredRollout, ...]
    """All samples: interleaved by tag, or in the order they were drawn where the model chose the tags."""

    @property
    def accuracy_N(self) -> np.ndarray:
        """float64 [N]: share of correct samples; NaN for a tag without samples."""
        return np.array([np.mean([s.correct for s in samples]) if samples else np.nan for samples in self.by_tag])


@dataclass(frozen=True)
class ScoredRun:
    """One scored file; at least one row."""

    name: str
    file: str
    rows: tuple[ScoredRollout, ...]

    @property
    def own_tags(self) -> bool:
        """The model chose the tags: how many samples a tag has is an outcome, not a design."""
        return self.rows[0].mode in OWN_MODES

    @cached_property
    def tags(self) -> tuple[int | None, ...]:
        """The N tags in use, ascending; None, for samples in which the model wrote no tag, comes last."""
        return tuple(sorted({row.tag for row in self.rows}, key=lambda tag: (tag is None, tag)))

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """In the order of their first rows."""
        by_id: dict[str, list[ScoredRollout]] = defaultdict(list)
        for row in self.rows:
            by_id[row.id].append(row)
        return tuple(self._question(rows) for rows in by_id.values())

    def _question(self, rows: list[ScoredRollout]) -> Question:
        rows = sorted(rows, key=lambda row: row.sample)
        by_tag = tuple(tuple(row for row in rows if row.tag == tag) for tag in self.tags)
        return Question(rows[0].id, by_tag, tuple(rows if self.own_tags else interleaved(by_tag)))


def load_runs(paths: Sequence[str | Path]) -> list[ScoredRun]:
    """The scored files, each under a name of its own. Raises UserError."""
    for path in paths:
        _check_scored(path)
    return [ScoredRun(name, str(path), tuple(read_scored(path))) for name, path in zip(run_names(paths), paths)]


def _check_scored(path: str | Path) -> None:
    """Raises UserError for a file of rollouts; whatever else is wrong with a file shows when it is read."""
    try:
        with Path(path).open("rb") as file:
            row = json.loads(file.readline().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(row, dict) and "text" in row and "correct" not in row:
        raise UserError(f"{path}:1: not scored yet; run megatron-ssft score first")


def run_names(paths: Sequence[str | Path]) -> list[str]:
    """The files' stems where they differ, else their folders' names, else both, numbered if that is not enough."""
    files = [Path(path).absolute() for path in paths]
    stems, folders = [file.stem for file in files], [file.parent.name for file in files]
    both = [f"{folder}/{stem}" for folder, stem in zip(folders, stems)]
    for names in (stems, folders, both):
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{number}" for number, name in enumerate(both, start=1)]


def read_groups(path: str | Path, field: str, runs: Sequence[ScoredRun] = ()) -> dict[str, str]:
    """Question's id -> value of `field`, of a JSONL file of questions. Raises UserError `file:line: ...`.

    `runs`: what the groups are for; a question that is another in one of these, under the same id, is refused.
    """
    groups: dict[str, str] = {}
    for number, name, row in _questions(path, runs):
        value = row.get(field)
        if value is None or isinstance(value, dict | list):
            raise UserError(f"{path}:{number}: no plain value in {field!r}, the field to group by; add it")
        if groups.setdefault(name, _name(value)) != _name(value):
            raise UserError(f"{path}:{number}: id {row['id']!r} already has another {field!r}; ids must be unique")
    return groups


def read_golds(path: str | Path, runs: Sequence[ScoredRun] = ()) -> dict[str, str]:
    """Question's id -> the reference of the published evaluation: the last box of `solution`, else `answer`.

    Questions without either are left out. `runs`: as for `read_groups`. Raises UserError `file:line: ...`.
    """
    golds: dict[str, str] = {}
    for number, name, row in _questions(path, runs):
        solution = row.get("solution")
        _, boxes = last_boxes(solution) if isinstance(solution, str) else (-1, [])
        value = boxes[-1] if boxes else row.get("answer")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            continue
        if golds.setdefault(name, str(value)) != str(value):
            raise UserError(f"{path}:{number}: id {row['id']!r} already has another reference; ids must be unique")
    return golds


def _questions(path: str | Path, runs: Sequence[ScoredRun]) -> Iterator[tuple[int, str, dict[str, object]]]:
    """(1-based line, id, row) of a file of questions. Raises UserError."""
    asked: dict[str, dict[str, str]] = defaultdict(dict)
    for run in runs:
        for sample in run.rows:
            if sample.question is not None:
                asked[sample.id].setdefault(sample.question, run.file)
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the questions: {error.strerror or error}; check the path") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON; repair or remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
            raise UserError(f"{path}:{number}: expected an object with an 'id'; repair or remove the line")
        marks = asked.get(str(row["id"]), {})
        own = mark_of_row(line, Path(path), number) if marks else None
        others = [file for mark, file in marks.items() if own not in (None, mark)]
        if others:
            raise UserError(
                f"{path}:{number}: id {row['id']!r} is another question than in {others[0]}; give the questions that "
                "the answers were generated from"
            )
        yield number, str(row["id"]), row


def _name(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
