"""Tokenized shards on the disk, each whole or not there, so that a build that was killed goes on where it was.

<number>.tokens   int32: of every set the prompt, then its completions
<number>.lengths  int64: of each of these arrays its length
<number>.needs    int64: of each trace the --seq-length that it needs
<number>.json     ids, lines, teachers, counters, sizes of the other files; written last
"""

from __future__ import annotations

import os
import secrets
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from megatron_ssft.data.tokenization import Tally
from megatron_ssft.formats.files import sync_file
from megatron_ssft.records import TokenizedSet

_ARRAYS = ("tokens", "lengths", "needs")


class PartIndex(Struct, kw_only=True):
    """The object in <number>.json."""

    sizes: dict[str, int]
    """Bytes of the other files."""
    lines: list[int]
    ids: list[str]
    traces: list[int]
    """For each question how many it has."""
    sources: list[list[str | None]]
    truncated: list[int]
    examples: int
    total_tokens: int
    longest_sequence: int
    counts: dict[str, int]
    spelled: dict[str, int]


class Part:
    """The files of one shard."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number

    def path(self, kind: str) -> Path:
        """Of one of the files."""
        return self._folder / f"{self._number:05d}.{kind}"

    def index(self) -> PartIndex | None:
        """None where the part is absent or not whole."""
        try:
            index = msgspec.json.decode(self.path("json").read_bytes(), type=PartIndex)
            whole = all(self.path(kind).stat().st_size == index.sizes[kind] for kind in _ARRAYS)
        except (OSError, KeyError, msgspec.MsgspecError):
            return None
        return index if whole else None

    def write(self, sets: Iterable[TokenizedSet], tally: Tally) -> None:
        """Write the sets as they come, then what `tally` has counted by then. Raises OSError."""
        index = PartIndex(
            sizes={}, lines=[], ids=[], traces=[], sources=[], truncated=[],
            examples=0, total_tokens=0, longest_sequence=0, counts={}, spelled={},
        )  # fmt: skip
        partial = {kind: self._partial(kind) for kind in (*_ARRAYS, "json")}
        try:
            lengths = self._write_tokens(partial["tokens"], sets, index)
            _write(partial["lengths"], lengths.tobytes())
            _write(partial["needs"], tally.needs.tobytes())
            index.sizes = {kind: partial[kind].stat().st_size for kind in _ARRAYS}
            index.examples, index.total_tokens = tally.examples, tally.total_tokens
            index.longest_sequence = tally.longest_sequence
            index.counts, index.spelled = dict(tally.counts), dict(tally.spelled)
            _write(partial["json"], msgspec.json.encode(index))
            for kind in (*_ARRAYS, "json"):
                os.replace(partial[kind], self.path(kind))
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)

    def _partial(self, kind: str) -> Path:
        return self._folder / f"{self._number:05d}.{kind}.{secrets.token_hex(4)}.tmp"

    def _write_tokens(self, path: Path, sets: Iterable[TokenizedSet], index: PartIndex) -> array[int]:
        """The lengths of the arrays; their tokens go to the file one set after the other."""
        lengths: array[int] = array("q")
        with open(path, "wb") as file:
            for each in sets:
                for ids in (each.prompt_ids, *each.completion_ids):
                    file.write(ids.tobytes())
                    lengths.append(len(ids))
                index.lines.append(each.line)
                index.ids.append(each.id)
                index.traces.append(each.num_traces)
                index.sources.append(list(each.sources))
                index.truncated.append(each.truncated)
            sync_file(file)
        return lengths

    def lengths(self) -> np.ndarray:
        """int64: of each array of the shard its length."""
        return np.fromfile(self.path("lengths"), np.int64)

    def tally(self, index: PartIndex) -> Tally:
        """What was counted over the shard."""
        needs: array[int] = array("q")
        needs.frombytes(self.path("needs").read_bytes())
        return Tally(
            examples=index.examples,
            total_tokens=index.total_tokens,
            longest_sequence=index.longest_sequence,
            trace_counts=Counter(index.traces),
            counts=Counter(index.counts),
            spelled=Counter(index.spelled),
            needs=needs,
        )


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        sync_file(file)
