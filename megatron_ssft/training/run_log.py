"""A run's log: JSONL files, TensorBoard, W&B, a progress bar or plain lines.

Only the first rank writes; the others have a `NullLog`. The JSONL files are cut back to the checkpoint that a run
resumes from, so that a joined run reads like an uninterrupted one. A log that cannot be written does not raise where
one rank alone would see it: it remembers that as its `failure`, which the training loop tells to all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_ssft.config import LoggingConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import to_object
from megatron_ssft.formats.log_cut import cut_log
from megatron_ssft.formats.metrics import METRICS
from megatron_ssft.training.trackers import open_tensorboard, open_wandb

Row = Struct | Mapping[str, object]
"""A record of formats/, or the same as a mapping: figures of an objective that has no record yet."""
Fields = Mapping[str, object]


class Log(Protocol):
    """A run's log as trainers use it, on every rank."""

    failure: str | None
    """Why the log cannot be written any more; None: it can."""

    def say(self, text: str) -> None:
        """Print one line."""

    def step(self, row: Row) -> None:
        """Log one optimizer step."""

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        """Append lines to one of the files."""

    def sync(self) -> None:
        """Bring the files onto the disk. Raises UserError where the log cannot be written."""


class RunLog:
    """Open for the length of a run; use as a context manager."""

    def __init__(
        self,
        folder: Path | None,
        logging: LoggingConfig,
        first_iteration: int,
        train_iters: int,
        files: Sequence[str],
        line: Callable[[Fields], str],
        *,
        is_continued: bool = False,
    ) -> None:
        """Open the files and trackers. Raises OSError, UserError.

        Args:
            first_iteration: the first step that will be logged: lines from it on are dropped from old files.
            files: names of the JSONL files; `metrics.jsonl` is one of them.
            line: a step's metrics as a line for a person.
            is_continued: whether the run goes on in this folder, so that its files should be there.
        """
        self._line = line
        self.console = Console()
        self._files: dict[str, IO[str]] = {}
        self.failure: str | None = None
        remarks: list[str] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                remarks += cut_log(folder / name, first_iteration, is_continued=is_continued)
                self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._tensorboard = open_tensorboard(folder, logging, first_iteration)
        self._wandb = open_wandb(folder, logging, first_iteration)
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=train_iters, completed=first_iteration - 1)
        for remark in remarks:
            self.say(remark)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for name, file in self._files.items():
            with self._failing_at(name):
                file.close()
        if self._tensorboard is not None:
            with self._failing_at("tensorboard"):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def say(self, text: str) -> None:
        """Print one line on the terminal or into the job's log."""
        with self._failing_at("standard output"):
            if self.console.is_terminal:
                self.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def step(self, row: Row) -> None:
        """Log one optimizer step everywhere."""
        fields = _fields(row)
        self.rows(METRICS, [fields])
        iteration = fields["iteration"]
        assert isinstance(iteration, int), iteration
        values = {k: v for k, v in fields.items() if k != "iteration" and isinstance(v, int | float)}
        if self._tensorboard is not None:
            with self._failing_at("tensorboard"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(values, step=iteration)
        self._progress.update(self._task, completed=iteration)
        self.say(self._line(fields))

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        """Append lines to one of the files; each has the `iteration` that it belongs to."""
        if name in self._files and self.failure is None:
            with self._failing_at(name):
                self._files[name].writelines(json.dumps(_fields(row)) + "\n" for row in rows)
                self._files[name].flush()

    def sync(self) -> None:
        """Bring the JSONL files onto the disk; called before a checkpoint is published."""
        for name, file in self._files.items():
            if self.failure is None:
                with self._failing_at(name):
                    os.fsync(file.fileno())
        if self.failure is not None:
            raise UserError(self.failure)

    @contextlib.contextmanager
    def _failing_at(self, name: str) -> Iterator[None]:
        """Remember the first OSError inside the `with` block. Nothing is written after it: a line would be missing."""
        try:
            yield
        except OSError as error:
            if self.failure is None:
                file = self._files.get(name)
                self.failure = (
                    f"{file.name if file else name}: cannot write the log: {error.strerror or error}; make room or "
                    "repair it, then go on with --load from the newest checkpoint"
                )
                if isinstance(error, FileNotFoundError):
                    gone = error.filename or name
                    self.failure = f"{gone}: is gone; was the folder moved or deleted? Nothing more is written"


class NullLog:
    """A log that keeps nothing: that of all ranks but the first. Use as a context manager."""

    failure: str | None = None

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None:
        """Print nothing."""

    def step(self, row: Row) -> None:
        """Log nothing."""

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        """Write nothing; `rows` are not even made."""

    def sync(self) -> None:
        """Nothing is to be brought onto the disk."""


def _fields(row: Row) -> dict[str, object]:
    return to_object(row) if isinstance(row, Struct) else dict(row)
