"""Sets tokenized once into a folder of arrays, keyed by content and settings.

    <cache_dir>/<key>/tokens.npy      int32 [T]    of every set: prompt, then its completions
                      offsets.npy     int64 [A+1]  array a is tokens[offsets[a]:offsets[a+1]]
                      set_starts.npy  int64 [Q+1]  set q is arrays set_starts[q] (prompt) .. set_starts[q+1]-1
                      index.json                   ids, places, teachers, summary, file sizes; written last

A folder appears under its final name by one rename, complete and on disk. All processes that build a key build
the same bytes, so it does not matter whose folder wins.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np

from megatron_ssft.config import DataConfig
from megatron_ssft.data.array_file import ArrayFile
from megatron_ssft.data.examples import read_examples
from megatron_ssft.data.prompt import TokenizationReport, tokenize_examples
from megatron_ssft.data.trace_filter import TraceFilter, parse_trace_filter
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import sync_file, sync_folder
from megatron_ssft.formats.jsonl import WrongRows
from megatron_ssft.records import ForkingTokens, TokenizedSet
from megatron_ssft.tokenizers.tokenizer import Tokenizer

_FORMAT_VERSION = 2
_DTYPES: dict[str, np.dtype] = {
    "tokens": np.dtype(np.int32),
    "offsets": np.dtype(np.int64),
    "set_starts": np.dtype(np.int64),
}
_INDEX = "index.json"


@dataclass(frozen=True)
class DataSummary(TokenizationReport):
    """Counters of a cache: those of tokenizing, and what ReadReport counts beside them."""

    questions_dropped: int
    traces_filtered: int
    traces_sampled_out: int


@dataclass(frozen=True)
class CacheIndex:
    """The object in index.json."""

    format_version: int
    fingerprint: str
    """Digest of data content, tokenizer, tags and settings; the same wherever the files lie."""
    sizes: dict[str, int]
    """Bytes of each array's file."""
    summary: DataSummary
    files: list[str]
    """Paths as they were given."""
    file_of: list[int]
    """For each question its place in `files`."""
    lines: list[int]
    """For each question its 1-based line."""
    ids: list[str]
    sources: list[list[str | None]]
    """For each question the teachers of its traces."""
    truncated: list[int]
    """For each question how many of its traces lost their end."""


Arrays = dict[str, ArrayFile]


class SetDataset:
    """Read access to a folder written by `build_dataset`; item i is a TokenizedSet of read-only arrays."""

    def __init__(self, index: CacheIndex, arrays: Arrays) -> None:
        self._index = index
        self._tokens, self._offsets, self._starts = (arrays[name] for name in _DTYPES)
        self.trace_counts: np.ndarray = (np.diff(self._starts.read_all()) - 1).astype(np.int32)
        """int32 [Q]: M of every question."""
        self.fingerprint = index.fingerprint
        """Digest of data content, tokenizer, tags and settings; the same wherever the files lie."""
        self.summary = index.summary
        """Counters of reading and tokenizing."""

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> SetDataset:
        """Opens the folder. Raises UserError if it is not a complete cache."""
        opened = _open_folder(Path(folder))
        if opened is None:
            raise UserError(f"{folder}: not a complete cache of tokenized data; delete it and start again")
        return cls(*opened)

    def __len__(self) -> int:
        return len(self.trace_counts)

    def __getitem__(self, i: int) -> TokenizedSet:
        q = range(len(self))[i]  # negative positions, IndexError
        start, end = self._starts.read(q, q + 2).tolist()
        bounds = self._offsets.read(start, end + 1)
        tokens = self._tokens.read(int(bounds[0]), int(bounds[-1]))
        prompt_ids, *completion_ids = np.split(tokens, (bounds[1:-1] - bounds[0]).tolist())
        index = self._index
        return TokenizedSet(
            id=index.ids[q],
            file=index.files[index.file_of[q]],
            line=index.lines[q],
            prompt_ids=prompt_ids,
            completion_ids=tuple(completion_ids),
            sources=tuple(index.sources[q]),
            truncated=index.truncated[q],
        )

    def __iter__(self) -> Iterator[TokenizedSet]:
        return (self[i] for i in range(len(self)))


def build_dataset(
    paths: Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    tags: ForkingTokens,
    data: DataConfig,
    seq_length: int,
    *,
    check_num_tags: bool,
    seed: int,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder with the tokenized `paths`, built unless it is there; open it with `SetDataset.open`.

    Every sequence (prompt, longest tag, completion) fits --seq-length. `check_num_tags`: refuse M > N. `seed`
    decides the --max-traces sample. `progress(done, total)` is called after every question.

    Raises UserError with one `file:line: reason` a wrong row, or when nothing is left, or the cache cannot be written.
    """
    trace_filter = None if data.trace_filter is None else parse_trace_filter(data.trace_filter)
    num_tags = tags.num_tags if check_num_tags else None
    fingerprint = _fingerprint(paths, tokenizer, tags, data, seq_length, num_tags, seed, trace_filter)
    # Messages name the file, so another path is another cache; the fingerprint does not change with it.
    key = hashlib.sha256(json.dumps([fingerprint, [os.fspath(path) for path in paths]]).encode()).hexdigest()
    folder = Path(cache_dir) / key
    if _open_folder(folder) is not None:
        return folder
    examples, report = read_examples(
        paths, num_tags=num_tags, max_traces=data.max_traces, trace_filter=trace_filter, seed=seed
    )
    sets, counts = tokenize_examples(examples, tokenizer, tags, data, seq_length, progress)
    summary = DataSummary(**dataclasses.asdict(report) | dataclasses.asdict(counts))
    try:
        _write_folder(folder, sets, fingerprint, summary)
    except OSError as error:
        raise UserError(
            f"{cache_dir}: cannot write the tokenized data: {reason_of(error)}; "
            "choose another folder with --data-cache-path"
        ) from error
    return folder


def _fingerprint(
    paths: Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    tags: ForkingTokens,
    data: DataConfig,
    seq_length: int,
    num_tags: int | None,
    seed: int,
    trace_filter: TraceFilter | None,
) -> str:
    """Digest of everything that decides the cache's content, or whether it may be built at all."""
    settings = {
        "format_version": _FORMAT_VERSION,
        "contents": _content_digests(paths),
        "tokenizer": tokenizer.fingerprint(),
        "tags": tags.ids,
        "num_tags": num_tags,
        "seq_length": seq_length,
        "overlong_traces": data.overlong_traces,
        "max_traces": data.max_traces,
        "sample_seed": None if data.max_traces is None else seed,
        "trace_filter": None if trace_filter is None else dataclasses.astuple(trace_filter),
        "answer_separator": data.answer_separator,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _content_digests(paths: Sequence[str | PathLike[str]]) -> list[str]:
    """sha256 of each file. Raises UserError naming every file that cannot be read."""
    wrong, digests = WrongRows(), []
    for path in paths:
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            wrong.add_unreadable(path, error)
        digests.append(digest.hexdigest())
    wrong.raise_if_any()
    return digests


def _write_folder(folder: Path, sets: list[TokenizedSet], fingerprint: str, summary: DataSummary) -> None:
    """Writes a temporary folder beside `folder`, syncs it, and gives it its name. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        _write_files(temporary, sets, fingerprint, summary)
        sync_folder(temporary)
        _publish(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where it became the cache


def _write_files(folder: Path, sets: list[TokenizedSet], fingerprint: str, summary: DataSummary) -> None:
    chunks = [array for s in sets for array in (s.prompt_ids, *s.completion_ids)]
    offsets = np.cumsum([0, *(len(chunk) for chunk in chunks)], dtype=np.int64)
    set_starts = np.cumsum([0, *(1 + s.num_traces for s in sets)], dtype=np.int64)
    contents = {"tokens": chunks, "offsets": [offsets], "set_starts": [set_starts]}
    for name, parts in contents.items():
        _write_array(folder / f"{name}.npy", parts, _DTYPES[name])
    files = list(dict.fromkeys(s.file for s in sets))
    file_of = {file: position for position, file in enumerate(files)}
    index = CacheIndex(
        format_version=_FORMAT_VERSION,
        fingerprint=fingerprint,
        sizes={name: (folder / f"{name}.npy").stat().st_size for name in contents},
        summary=summary,
        files=files,
        file_of=[file_of[s.file] for s in sets],
        lines=[s.line for s in sets],
        ids=[s.id for s in sets],
        sources=[list(s.sources) for s in sets],
        truncated=[s.truncated for s in sets],
    )
    with open(folder / _INDEX, "w", encoding="utf-8") as file:
        json.dump(vars(index) | {"summary": vars(summary)}, file)
        sync_file(file)


def _write_array(path: Path, parts: list[np.ndarray], dtype: np.dtype) -> None:
    """One `.npy` file from consecutive parts, without joining them in memory; written, not mapped, because a full
    disk then is an error and not a bus error."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (sum(len(part) for part in parts),),
    }
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.tobytes())
        sync_file(file)


def _publish(temporary: Path, folder: Path) -> None:
    """Makes `temporary` the cache, unless another process was faster; a damaged cache is repaired in place."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _open_folder(folder) is not None:
            return
        # Same key, same bytes: replacing file by file is right even if another process does so at the same time.
        for name in (*(f"{name}.npy" for name in _DTYPES), _INDEX):
            os.replace(temporary / name, folder / name)
        sync_folder(folder)


def _open_folder(folder: Path) -> tuple[CacheIndex, Arrays] | None:
    """Index and arrays, or None where the folder is absent, incomplete or damaged."""
    try:
        # json, not msgspec: a path may hold bytes that are no UTF-8. Not strict: keys of a histogram are texts in JSON.
        index = msgspec.convert(json.loads((folder / _INDEX).read_bytes()), CacheIndex, strict=False)
        if index.format_version != _FORMAT_VERSION:
            return None
        arrays: Arrays = {}
        for name, dtype in _DTYPES.items():
            path = folder / f"{name}.npy"
            if path.stat().st_size != index.sizes[name]:
                return None
            arrays[name] = ArrayFile(path, dtype)
        return (index, arrays) if _consistent(index, **arrays) else None
    except (OSError, ValueError, LookupError, EOFError, RecursionError, msgspec.MsgspecError):
        return None


def _consistent(index: CacheIndex, tokens: ArrayFile, offsets: ArrayFile, set_starts: ArrayFile) -> bool:
    """Whether the arrays can belong together; catches blocks of zeros that a crashed file system may leave."""
    bounds, starts = offsets.read_all(), set_starts.read_all()
    return bool(
        len(starts) == len(index.ids) + 1
        and starts[0] == bounds[0] == 0
        and starts[-1] == len(bounds) - 1
        and bounds[-1] == len(tokens)
        and (np.diff(starts) > 1).all()
        and (np.diff(bounds) > 0).all()
    )
