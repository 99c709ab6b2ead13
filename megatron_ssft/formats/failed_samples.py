"""Samples that could not be generated, noted beside the files that lack them.

`R.failed.jsonl` stands beside `R.jsonl` while samples of that file are missing because a server never gave them, and
`S.failed.jsonl` beside the scores of such a file. A sample that was made later is in the file itself, which counts.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.jsonl import Count, Name, RowError, convert_row, parse_object, to_object
from megatron_ssft.formats.rollouts import RolloutKey, Sample

FAILED_SAMPLES = 3
"""Exit status of `generate` where the file lacks samples that could not be made."""
_SUFFIX = ".failed.jsonl"


class FailedSample(Struct, frozen=True, kw_only=True):
    """One line: a sample that the file beside it lacks."""

    id: Name
    slot: Annotated[Count | None, Meta(description="a whole number from 0, or null")]
    """The tag it was asked for, 0-based; None where the model was to choose."""
    sample: Count
    reason: Name
    """What came instead. What stands before the first colon names the kind."""

    @property
    def key(self) -> RolloutKey:
        """The sample's place in the file."""
        return self.id, self.slot, self.sample

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


def failed_path(path: Path) -> Path:
    """Where the missing samples of a file of rollouts or scores are noted: R.jsonl -> R.failed.jsonl."""
    return path.with_name(path.name.removesuffix(".jsonl") + _SUFFIX)


def write_failed(path: Path, failed: Sequence[FailedSample]) -> None:
    """Note what the file at `path` lacks, whole or not at all; nothing is left behind if it lacks none.

    Raises UserError, also where another file has that name.
    """
    beside = failed_path(path)
    read_failed(path)
    try:
        if failed:
            write_durably(beside, "".join(json.dumps(to_object(row)) + "\n" for row in failed))
        else:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{beside}: cannot note the failed samples: {reason_of(error)}; start again") from error


def read_failed(path: Path, there: Collection[RolloutKey] = ()) -> list[FailedSample]:
    """What the file at `path` is noted to lack, but for `there`. Raises UserError."""
    beside, rows = failed_path(path), list[FailedSample]()
    try:
        lines = beside.read_bytes().splitlines() if beside.exists() else []
    except OSError as error:
        raise UserError(f"{beside}: cannot read the file: {error.strerror or error}; check the path") from error
    for number, raw in enumerate(lines, start=1):
        try:
            rows.append(convert_row(parse_object(raw), FailedSample))
        except RowError as error:
            what = "not a note of failed samples, which this name is for; move the file away"
            raise UserError(f"{beside}:{number}: {what} ({error})") from error
    return [row for row in rows if row.key not in there]


def carry_over(rollouts: Path, scores: Path, there: Collection[RolloutKey]) -> list[FailedSample]:
    """Note beside `scores` what `rollouts` lacks; returns that. `there`: samples that are scored. Raises UserError."""
    failed = read_failed(rollouts, there)
    write_failed(scores, failed)
    return failed


def kinds(failed: Iterable[FailedSample]) -> str:
    """The reasons with their counts, the most frequent first: `finish_reason "abort" 3, status 500 1`."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(row.kind for row in failed).most_common())


def without_samples(rows: Iterable[Sample], failed: Iterable[FailedSample]) -> set[str]:
    """Questions that have no sample at all under a tag, or under none, because all of them failed."""
    slots: dict[str, set[int | None]] = defaultdict(set)
    for row in rows:
        slots[row.id].add(row.key[1])
    return {row.id for row in failed if row.slot not in slots[row.id]}


def missing_note(path: Path, failed: Sequence[FailedSample], advice: str) -> str:
    """One line for those who read a file that lacks samples."""
    return f"{path}: {len(failed)} samples are missing, they could not be generated ({kinds(failed)}); {advice}"
