"""Rollouts on disk: one JSON object per line. rollout_writer.py appends them and resumes after a kill.

A file holds the samples of one model with one tokenizer under one set of sampling settings; whatever mixes them is
refused. Tags are 0-based. A sample's place is (id, tag slot, sample): the slot is the tag it was asked for, or None
where the model chose the tag itself, so that a resumed run knows what is left without knowing what the model chose.

Lines of R.jsonl are `Rollout`, lines of S.jsonl `ScoredRollout`; their fields say what is what. Some are marks, 16
hexadecimal digits each: `prompt` and `question` in both and `judged` in S.jsonl of what a line was made from,
`completion` in S.jsonl of the text. Files of earlier versions lack them. Those without `prompt` or `judged` can be read
but not gone on with. Who joins files by their ids says where marks are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from msgspec import Meta, Struct

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.jsonl import REPAIR, Count, Name, RowError, convert_row, must_be, parse_object, to_object

RolloutKey = tuple[str, "int | None", int]
"""(question's id, tag slot, sample number)."""

OWN_MODES = ("own", "own-greedy")
"""Sampling modes in which the model chooses its tag."""
MODES = ("each", "fixed", "round-robin", "none", *OWN_MODES)
_OPTIONAL = ("prompt", "question", "judged", "completion")


Tag = Annotated[Count | None, Meta(description="a whole number from 0, or null")]
Mark = Annotated[
    Annotated[str, Meta(pattern="^[0-9a-f]{16}$")] | None, Meta(description="16 hexadecimal digits, or null")
]


class Sample(Struct, frozen=True, kw_only=True):
    """The fields that R.jsonl and S.jsonl share: one generated sample."""

    id: Name
    tag: Tag
    """0-based; None where the model was free to choose and wrote no tag."""
    sample: Count
    """0-based within (id, tag slot)."""
    finish_reason: Annotated[Literal["stop", "length"], Meta(description="stop or length")]
    """`stop`, or `length` where the sample ran into its token limit."""
    seed: Annotated[int, Meta(description="a whole number")]
    sampling: Annotated[Mapping[str, object], Meta(description=f"an object with mode {'|'.join(MODES)}")]
    """`mode` (one of MODES), temperature, top_p, max_new_tokens and whatever else shaped the samples."""
    model: Name
    """Fingerprint."""
    tokenizer: Name
    """Fingerprint."""
    prompt: Mark = None
    """`mark` of the prompt's token ids, without the tag; None in files of earlier versions."""
    question: Mark = None
    """`mark` of what the questions file asks, whatever the tokenizer; None in files of earlier versions."""

    @property
    def mode(self) -> str:
        """Who chose the tag: one of MODES."""
        return str(self.sampling["mode"])

    @property
    def key(self) -> RolloutKey:
        """The sample's place."""
        return self.id, (None if self.mode in OWN_MODES else self.tag), self.sample


class Rollout(Sample, frozen=True, kw_only=True):
    """One line of R.jsonl."""

    text: Annotated[str, Meta(description="a string")]
    token_ids: Annotated[tuple[Count, ...], Meta(description="a list of whole numbers from 0")]


class ScoredRollout(Sample, frozen=True, kw_only=True):
    """One line of S.jsonl."""

    correct: Annotated[bool, Meta(description="true or false")]
    answer: Annotated[str | None, Meta(description="a string or null")]
    """What the verifier extracted; None if it found no answer."""
    verdict: Name
    """`correct`, `wrong`, `no answer`, `timeout`, ..."""
    verifier: Name
    """exact, math, choice or code."""
    num_tokens: Count
    truncated: Annotated[bool, Meta(description="true or false")]
    """The sample ended at its token limit."""
    judged: Mark = None
    """`mark` of all that the verdict depends on: text, gold answer, verifier, its settings; None in files of earlier
    versions."""
    completion: Mark = None
    """`mark` of the text alone, by which votes tell whole completions apart; None in files of earlier versions."""


Record = TypeVar("Record", bound=Sample)


def mark(value: object) -> str:
    """16 hexadecimal digits that tell JSON values apart: BLAKE2b over their spelling with sorted keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode("ascii"), digest_size=8).hexdigest()


EMPTY_COMPLETION = mark("")
"""`completion` of a sample without any text."""


def score_rollout(
    rollout: Rollout, *, correct: bool, answer: str | None, verdict: str, verifier: str, judged: str | None = None
) -> ScoredRollout:
    """The scored line of `rollout`: its own fields without text and tokens, and what the verifier said."""
    return ScoredRollout(
        **{field: getattr(rollout, field) for field in Sample.__struct_fields__},
        correct=correct,
        answer=answer,
        verdict=verdict,
        verifier=verifier,
        num_tokens=len(rollout.token_ids),
        truncated=rollout.finish_reason == "length",
        judged=judged,
        completion=mark(rollout.text),
    )


def read_rollouts(path: str | Path) -> Iterator[Rollout]:
    """The lines of a rollout file, one by one. Raises UserError `file:line: ...` for the first wrong one."""
    return _read(Path(path), Rollout)


def read_scored(path: str | Path) -> list[ScoredRollout]:
    """All lines of a scored file. Raises UserError `file:line: ...` for the first wrong one."""
    return list(_read(Path(path), ScoredRollout))


def read_finished_scored(path: str | Path) -> tuple[list[tuple[int, ScoredRollout]], int, bytes]:
    """The lines of a scored file that end, each with its number from 1; their size in bytes; what follows them.

    Raises OSError; UserError `file:line: ...` for the first wrong line.
    """
    checks, whole = FileChecks(Path(path), ScoredRollout), 0
    rows: list[tuple[int, ScoredRollout]] = []
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return rows, whole, raw
            if raw.strip():
                rows.append((number, checks.parse(number, raw)))
            whole += len(raw)
    return rows, whole, b""


def write_scored(path: str | Path, rows: Iterable[ScoredRollout]) -> None:
    """Write the whole file at once: after a crash the old one or the new one is there. Raises UserError."""
    try:
        write_durably(Path(path), "".join(map(to_line, rows)))
    except OSError as error:
        raise UserError(f"{path}: cannot write the scores: {reason_of(error)}; give another --output") from error


def to_line(record: Sample) -> str:
    """The record as one line, pure ASCII (generated text may hold line separators and halves of surrogate pairs).

    A mark that is None is left out, as in the file it was read from.
    """
    row = to_object(record)
    row = {name: value for name, value in row.items() if value is not None or name not in _OPTIONAL}
    return json.dumps(row, allow_nan=False) + "\n"


def _read(path: Path, kind: type[Record]) -> Iterator[Record]:
    checks = FileChecks(path, kind)
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield checks.parse(number, raw)
    except OSError as error:
        raise UserError(f"{path}: cannot read the file: {error.strerror or error}; check the path") from error
    if not checks.lines:
        raise UserError(f"{path}:1: the file is empty; expected one JSON object a line")


class FileChecks(Generic[Record]):
    """Turns lines into records and sees to what must hold over the whole file."""

    def __init__(self, path: Path, kind: type[Record], expected: dict[str, object] | None = None) -> None:
        """`expected`: the origin the samples must have, where it is known beforehand."""
        self._path, self._kind, self._expected = path, kind, expected
        self._first: dict[str, object] | None = None
        self.lines: dict[RolloutKey, int] = {}
        """Each sample's line."""
        self._prompts: dict[str, tuple[str, int]] = {}
        """Question's id -> mark of its prompt, and the line that has it."""

    def parse(self, number: int, raw: bytes) -> Record:
        """The record of line `number` (1-based). Raises UserError."""
        where = f"{self._path}:{number}"
        record = _record(where, raw, self._kind)
        origin = sample_origin(record)
        if self._expected is not None and origin != self._expected:
            unlike = differences(origin, self._expected)
            raise UserError(f"{where}: made by another run, {unlike} now; give another --output")
        self._first = self._first or origin
        if origin != self._first:
            unlike = differences(self._first, origin)
            raise UserError(f"{where}: not of one run, {unlike} here; keep one model and one setting in a file")
        if record.key in self.lines:
            name = f"id {record.id!r}, tag {record.tag}, sample {record.sample}"
            raise UserError(f"{where}: {name} is already on line {self.lines[record.key]}; remove one of them")
        self.lines[record.key] = number
        if record.prompt is not None:
            prompt, line = self._prompts.setdefault(record.id, (record.prompt, number))
            if prompt != record.prompt:
                raise UserError(
                    f"{where}: id {record.id!r} has another prompt here than on line {line}; keep the samples of two "
                    "questions apart, and give each its own id"
                )
        return record


def sample_origin(sample: Sample) -> dict[str, object]:
    """The fields that `sample` must share with all samples of its file."""
    return origin_of(sample.model, sample.tokenizer, sample.sampling)


def origin_of(model: str, tokenizer: str, sampling: Mapping[str, object]) -> dict[str, object]:
    """The fields that all samples of a file share, from their parts."""
    return {"model": model, "tokenizer": tokenizer, **sampling}


def differences(before: dict[str, object], after: dict[str, object]) -> str:
    """`temperature 0.7 before and 1.0`, for all that differs."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(f"{key} {json.dumps(before.get(key))} before and {json.dumps(after.get(key))}" for key in keys)


def _record(where: str, raw: bytes, kind: type[Record]) -> Record:
    """The record of one line, `where` = file:line; fields it does not know are left out. Raises UserError."""
    try:
        row = parse_object(raw)
    except RowError as error:
        if raw.endswith(b"\n"):
            raise UserError(f"{where}: {error}; {REPAIR}") from error
        raise UserError(f"{where}: not valid JSON; its writer was stopped: resume it") from error
    try:
        record = convert_row(row, kind)
        if record.sampling.get("mode") not in MODES:
            raise RowError(must_be("sampling", record.sampling, kind))
    except RowError as error:
        raise UserError(f"{where}: {error}; {REPAIR}") from error
    return record
