"""Sets tokenized once into a folder of arrays, keyed by content and settings, wherever the files lie.

    <cache_dir>/<key>/tokens.npy      int32 [T]    of every set: prompt, then its completions
                      offsets.npy     int64 [A+1]  array a is tokens[offsets[a]:offsets[a+1]]
                      set_starts.npy  int64 [Q+1]  set q is arrays set_starts[q] (prompt) .. set_starts[q+1]-1
                      index.json                   ids, places, teachers, summary, file sizes; written last

A folder appears under its final name by one rename, complete and on disk. All processes that build a key build
the same tokens, so it does not matter whose folder wins. Until then `.<key>.parts` holds what is tokenized.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np

from megatron_ssft.config import DataConfig
from megatron_ssft.data.array_file import ArrayFile
from megatron_ssft.data.fingerprint import FORMAT_VERSION, data_fingerprint
from megatron_ssft.data.parts import Part
from megatron_ssft.data.reading import Reading, Selection
from megatron_ssft.data.shards import SHARD_BYTES, KilledWorker, ShardJob, tokenize_shards
from megatron_ssft.data.tokenization import Tally, TokenizationReport, rules_of
from megatron_ssft.data.trace_filter import parse_trace_filter
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import sync_file, sync_folder
from megatron_ssft.records import ForkingTokens, TokenizedSet
from megatron_ssft.tokenizers.tokenizer import Tokenizer

_BLOCK = 1 << 20
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
    """Paths as they were given to whoever built it."""
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

    def __init__(self, index: CacheIndex, arrays: Arrays, files: Sequence[str] | None = None) -> None:
        self._index = index
        self._files = index.files if files is None else files
        self._tokens, self._offsets, self._starts = (arrays[name] for name in _DTYPES)
        self.trace_counts: np.ndarray = (np.diff(self._starts.read_all()) - 1).astype(np.int32)
        """int32 [Q]: M of every question."""
        self.fingerprint = index.fingerprint
        """Digest of data content, tokenizer, tags and settings; the same wherever the files lie."""
        self.summary = index.summary
        """Counters of reading and tokenizing."""

    @classmethod
    def open(cls, folder: str | PathLike[str], files: Sequence[str | PathLike[str]] | None = None) -> SetDataset:
        """Opens the folder. Raises UserError if it is not a complete cache.

        Args:
            files: paths of the files, for messages; default: those that it was built from, which had the same content.
        """
        opened = _open_folder(Path(folder))
        if opened is None or (files is not None and len(files) != len(opened[0].files)):
            raise UserError(f"{folder}: not a complete cache of tokenized data; delete it and start again")
        return cls(*opened, files=None if files is None else [os.fspath(path) for path in files])

    def __len__(self) -> int:
        return len(self.trace_counts)

    def sequence_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [Q], int64 [Q]: tokens of each question's longest sequence, and of all of them, each with its prompt.

        Tags are left out.
        """
        starts, lengths = self._starts.read_all(), np.diff(self._offsets.read_all())
        prompts = lengths[starts[:-1]]
        completions = lengths.copy()
        completions[starts[:-1]] = 0
        longest = np.maximum.reduceat(completions, starts[:-1])
        return prompts + longest, np.add.reduceat(completions, starts[:-1]) + prompts * self.trace_counts

    def __getitem__(self, i: int) -> TokenizedSet:
        q = range(len(self))[i]  # negative positions, IndexError
        start, end = self._starts.read(q, q + 2).tolist()
        bounds = self._offsets.read(start, end + 1)
        tokens = self._tokens.read(int(bounds[0]), int(bounds[-1]))
        prompt_ids, *completion_ids = np.split(tokens, (bounds[1:-1] - bounds[0]).tolist())
        index = self._index
        return TokenizedSet(
            id=index.ids[q],
            file=self._files[index.file_of[q]],
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
    rebuild: Callable[[], Tokenizer] | None = None,
) -> Path:
    """The folder with the tokenized `paths`, built unless it is there; open it with `SetDataset.open`.

    Every sequence (prompt, longest tag, completion) fits --seq-length. `check_num_tags`: refuse M > N. `seed`
    decides the --max-traces sample. `progress(done, total)` is called after every question, or every shard where
    several processes tokenize. `rebuild` makes the tokenizer in them; without it there is one process.

    The files are read twice, a row at a time: all rows are checked before the first is tokenized. Neither their text
    nor their tokens stand in memory as a whole. A build that is killed goes on with the shards it has done.

    Raises UserError with one `file:line: reason` a wrong row, or when nothing is left, or the cache cannot be written.
    """
    trace_filter = None if data.trace_filter is None else parse_trace_filter(data.trace_filter)
    selection = Selection(tags.num_tags if check_num_tags else None, data.max_traces, trace_filter, seed)
    rules = rules_of(tags, data, seq_length)
    fingerprint = data_fingerprint(paths, tokenizer, tags, selection, rules)
    folder = Path(cache_dir) / fingerprint
    if _open_folder(folder) is not None:
        return folder
    reading = Reading(paths, selection, SHARD_BYTES)
    for _ in reading.examples():
        pass
    parts = folder.with_name(f".{folder.name}.parts")
    job = ShardJob(parts, selection, rules)
    workers = 1 if rebuild is None else data.tokenizing_workers
    try:
        parts.mkdir(parents=True, exist_ok=True)
        try:
            tokenize_shards(job, reading.shards, tokenizer, workers, rebuild or (lambda: tokenizer), progress)
            _join_parts(folder, parts, reading, paths, fingerprint, seq_length)
        except FileNotFoundError:
            # Another process has finished the same work meanwhile, and cleared up.
            if _open_folder(folder) is None:
                raise
        except KilledWorker:
            raise  # what is done is gone on with
        except UserError:  # with other rows it is another cache
            shutil.rmtree(parts, ignore_errors=True)
            raise
        shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{cache_dir}: cannot write the tokenized data: {reason_of(error)}; "
            "choose another folder with --data-cache-path"
        ) from error
    return folder


def _join_parts(
    folder: Path,
    parts: Path,
    reading: Reading,
    paths: Sequence[str | PathLike[str]],
    fingerprint: str,
    seq_length: int,
) -> None:
    """Makes the folder of the parts of all shards. Raises UserError where no set is left, OSError."""
    tally, indices, lengths = Tally(), [], []
    numbered = [(Part(parts, number), shard) for number, shard in enumerate(reading.shards)]
    for part, _ in numbered:
        found = part.index()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "a tokenized part is gone", str(part.path("json")))
        tally.merge(part.tally(found))
        indices.append(found)
        lengths.append(part.lengths())
    summary = DataSummary(**dataclasses.asdict(reading.report) | dataclasses.asdict(tally.report(seq_length)))
    index = CacheIndex(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        sizes={},
        summary=summary,
        files=[os.fspath(path) for path in paths],
        file_of=[shard.file for (_, shard), each in zip(numbered, indices) for _ in each.ids],
        lines=[line for each in indices for line in each.lines],
        ids=[name for each in indices for name in each.ids],
        sources=[sources for each in indices for sources in each.sources],
        truncated=[count for each in indices for count in each.truncated],
    )
    starts = np.cumsum([0, *(1 + traces for each in indices for traces in each.traces)], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        _write_array(temporary, "tokens", int(offsets[-1]), (_blocks(part.path("tokens")) for part, _ in numbered))
        _write_array(temporary, "offsets", len(offsets), [[offsets.tobytes()]])
        _write_array(temporary, "set_starts", len(starts), [[starts.tobytes()]])
        sizes = {name: (temporary / f"{name}.npy").stat().st_size for name in _DTYPES}
        with open(temporary / _INDEX, "w", encoding="utf-8") as file:
            json.dump(vars(index) | {"sizes": sizes, "summary": vars(summary)}, file)
            sync_file(file)
        sync_folder(temporary)
        _publish(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where it became the cache


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _write_array(folder: Path, name: str, length: int, contents: Iterable[Iterable[bytes]]) -> None:
    """One `.npy` file from consecutive bytes, without joining them in memory; written, not mapped, because a full
    disk then is an error and not a bus error."""
    header = {"descr": np.lib.format.dtype_to_descr(_DTYPES[name]), "fortran_order": False, "shape": (length,)}
    with open(folder / f"{name}.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for blocks in contents:
            file.writelines(blocks)
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
        if index.format_version != FORMAT_VERSION:
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
