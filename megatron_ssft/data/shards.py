"""Tokenize the shards of a data set, in this process or in several, each into its part on the disk."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.data.parts import Part
from megatron_ssft.data.reading import Selection, Shard, read_shard
from megatron_ssft.data.tokenization import Rules, Tally, tokenize_each
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.records import TokenizedSet
from megatron_ssft.tokenizers.tokenizer import Tokenizer

SHARD_BYTES = 32 << 20
"""Text of a shard: what a kill costs at most, for each process."""
_PR_SET_PDEATHSIG = 1
Progress = Callable[[int, int], None]


class KilledWorker(UserError):
    """A process that tokenizes is gone. The shards that are done stay."""


class _Failed(Exception):
    """Rows of a shard are wrong, so that it becomes no part."""


@dataclass(frozen=True)
class ShardJob:
    """What is the same for all shards. Goes to other processes as it is."""

    folder: Path
    """Of the parts; it exists."""
    selection: Selection
    rules: Rules

    def tokenize(self, number: int, shard: Shard, tokenizer: Tokenizer, done: Callable[[], None]) -> WrongRows:
        """Write the part of a shard unless there are wrong rows, which are returned. Raises OSError."""
        wrong, tally = WrongRows(), Tally()

        def sets() -> Iterator[TokenizedSet]:
            examples = read_shard(shard, self.selection)
            yield from tokenize_each(examples, tokenizer, self.rules, tally, wrong, done)
            if wrong:
                raise _Failed

        try:
            Part(self.folder, number).write(sets(), tally)
        except _Failed:
            pass
        except RowError as error:
            raise UserError(f"{shard.path}: has changed while it was read ({error}); start again") from error
        return wrong


def tokenize_shards(
    job: ShardJob,
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    workers: int,
    rebuild: Callable[[], Tokenizer],
    progress: Progress | None,
) -> None:
    """Make the parts of all shards; those that are there are left as they are.

    Args:
        workers: processes; with one it is this process.
        rebuild: makes the tokenizer in another process.
        progress: called with questions that are done and questions in all, after every question or shard.

    Raises:
        UserError: rows are wrong, a line each, of all shards.
        OSError: a part cannot be written.
    """
    total, done = sum(shard.questions for shard in shards), 0
    todo = []
    for number, shard in enumerate(shards):
        if Part(job.folder, number).index() is None:
            todo.append(number)
        else:
            done += shard.questions

    def advance(questions: int = 1) -> None:
        nonlocal done
        done += questions
        if progress is not None:
            progress(done, total)

    if workers > 1 and len(todo) > 1:
        found = _in_processes(job, shards, todo, workers, rebuild, advance)
    else:
        found = {number: job.tokenize(number, shards[number], tokenizer, advance) for number in todo}
    wrong = WrongRows()
    for _, rows in sorted(found.items()):
        wrong.merge(rows)
    wrong.raise_if_any()


def _in_processes(
    job: ShardJob,
    shards: Sequence[Shard],
    todo: Sequence[int],
    workers: int,
    rebuild: Callable[[], Tokenizer],
    advance: Callable[[int], None],
) -> dict[int, WrongRows]:
    """Number -> wrong rows of each shard. Raises UserError, OSError."""
    found = {}
    # Not forked: the tokenizers' library has threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (rebuild,))
    try:
        futures = {pool.submit(_work, job, number, shards[number]): number for number in todo}
        for future in as_completed(futures):
            number = futures[future]
            found[number] = future.result()
            advance(shards[number].questions)
    except BrokenProcessPool as error:
        raise KilledWorker(
            f"a process that tokenizes was killed, for want of memory mostly; start again with fewer than {workers} "
            "--tokenizing-workers: what is done is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return found


_tokenizer: list[Tokenizer] = []
"""Of a process that tokenizes for another one."""


def _begin(rebuild: Callable[[], Tokenizer]) -> None:
    # They wait for work for ever where their parent was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to see
    _tokenizer.append(rebuild())


def _work(job: ShardJob, number: int, shard: Shard) -> WrongRows:
    return job.tokenize(number, shard, _tokenizer[0], lambda: None)
