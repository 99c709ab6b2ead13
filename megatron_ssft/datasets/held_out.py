"""A training set in two: every question goes to one side by a hash of its id."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from megatron_ssft.datasets.tables import Progress, Row, check_row, parsed_rows, question_key
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import publish_file, sync_file
from megatron_ssft.formats.jsonl import WrongRows
from megatron_ssft.seeded import text_digest, whole_number

FILES = ("train.jsonl", "heldout.jsonl")


class SplitReport(NamedTuple):
    """Files and sizes of the two sides of a split."""

    train: Path
    held_out: Path
    train_rows: int
    held_out_rows: int
    repeated: int
    """Rows with the same words as another row under another id; they go with it."""


def split_set(
    paths: list[Path], folder: Path, held_out: float, seed: int, progress: Progress | None = None
) -> SplitReport:
    """Write train.jsonl and heldout.jsonl in `folder`, the rows in the order of `paths`, JSONL files all.

    A question is held out if a hash of `seed` and its id falls below `held_out`: its side does not depend on the other
    questions, and a larger share holds out more of them. Questions of the same words count as one, under the first of
    their ids in alphabetical order. Raises UserError for wrong rows, for a side that stays empty and for a disk that
    refuses.
    """
    if not 0 < held_out < 1:
        raise UserError(f"--held-out {held_out}: must lie between 0 and 1, as in 0.1")
    train, held_out_file = targets = tuple(folder / name for name in FILES)
    for path in paths:
        if path.suffix != ".jsonl":
            raise UserError(f"{path}: only JSONL files can be split; make one with the command pool")
        if any(target.exists() and path.exists() and path.samefile(target) for target in targets):
            raise UserError(f"--output-dir {folder}: would overwrite {path}; give another --output-dir")
    ids, repeated = _first_ids(paths, progress)
    held_out_keys = {key for key, name in ids.items() if is_held_out(name, held_out, seed)}
    if not held_out_keys or len(held_out_keys) == len(ids):
        side = "all" if held_out_keys else "none"
        raise UserError(
            f"--held-out {held_out}: {side} of the {len(ids)} questions would be held out; change it or --seed"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        train_rows, held_out_rows = _write(paths, targets, held_out_keys)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot write the sets: {reason_of(error)}") from error
    return SplitReport(train, held_out_file, train_rows, held_out_rows, repeated)


def is_held_out(name: str, share: float, seed: int) -> bool:
    """Whether the question with the id `name` is among the `share` that is held out."""
    return whole_number(text_digest(seed, name, joined_by="\n"), bits=64) < share * 2**64


def _first_ids(paths: list[Path], progress: Progress | None) -> tuple[dict[str, str], int]:
    """Each question's key -> the first of its ids, and how many rows had another one. Raises UserError."""
    wrong = WrongRows()
    ids: dict[str, str] = {}
    places: dict[str, str] = {}
    repeated = 0

    def parse(row: Row) -> tuple[str, str]:
        check_row(row, traces_required=False)
        return question_key(row), str(row["id"])

    for path, line, (key, name) in parsed_rows(paths, parse, wrong, progress):
        place = f"{path}:{line}"
        if name in places:
            wrong.add(path, line, f"id {name!r} is already used at {places[name]}; ids must be unique")
            continue
        places[name] = place
        repeated += key in ids
        ids[key] = min(name, ids.get(key, name))
    wrong.raise_if_any()
    return ids, repeated


def _write(paths: Iterable[Path], targets: Sequence[Path], held_out_keys: set[str]) -> list[int]:
    """Write both files, then give them their names; returns their numbers of rows. Raises OSError."""
    counts = [0, 0]
    with tempfile.TemporaryDirectory(dir=targets[0].parent, prefix=".split.") as work:
        parts = [Path(work, target.name) for target in targets]
        with ExitStack() as stack:
            files = [stack.enter_context(open(part, "w", encoding="utf-8")) for part in parts]
            for _, _, row in parsed_rows(list(paths), lambda row: row, WrongRows()):
                side = question_key(row) in held_out_keys
                counts[side] += 1
                files[side].write(json.dumps(row, ensure_ascii=False) + "\n")
            for file in files:
                sync_file(file)
        for part, target in zip(parts, targets):
            publish_file(part, target)
    return counts
