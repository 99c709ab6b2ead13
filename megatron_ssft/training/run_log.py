"""A run's log: JSONL files, TensorBoard, W&B, a progress bar or plain lines.

Only the first rank writes; the others have a `NullLog`. The JSONL files are cut back to the checkpoint that a run
resumes from, so that a joined run reads like an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_ssft.config import LoggingConfig
from megatron_ssft.formats.jsonl import to_object
from megatron_ssft.formats.metrics import METRICS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = Struct | Mapping[str, object]
"""A record of formats/, or the same as a mapping: figures of an objective that has no record yet."""
Fields = Mapping[str, object]


class WandbRun(Protocol):
    """The part of W&B's run that is used; the package is optional and has no stubs here."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Log(Protocol):
    """A run's log as trainers use it, on every rank."""

    def say(self, text: str) -> None:
        """Print one line."""

    def step(self, row: Row) -> None:
        """Log one optimizer step."""

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        """Append lines to one of the files."""

    def sync(self) -> None:
        """Bring the files onto the disk."""


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
    ) -> None:
        """
        Args:
            first_iteration: the first step that will be logged: lines from it on are dropped from old files.
            files: names of the JSONL files; `metrics.jsonl` is one of them.
            line: a step's metrics as a line for a person.
        """
        self._line = line
        self.console = Console()
        self._files: dict[str, IO[str]] = {}
        self._tensorboard: SummaryWriter | None = None
        self._wandb: WandbRun | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                # A start that came to nothing may have left lines of iteration 0.
                truncate_from(folder / name, first_iteration if first_iteration > 1 else 0)
                self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._open_trackers(folder, logging, first_iteration)
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=train_iters, completed=first_iteration - 1)

    def _open_trackers(self, folder: Path | None, logging: LoggingConfig, first_iteration: int) -> None:
        target = logging.tensorboard_dir or (folder and str(folder / "tensorboard"))
        if target:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(target, purge_step=first_iteration)
        if logging.wandb_project:
            import wandb

            # The run folder decides the id, so that a resumed job goes on in the same W&B run.
            run_id = folder and hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=logging.wandb_project, name=logging.wandb_exp_name, id=run_id, resume="allow"
            )

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def say(self, text: str) -> None:
        """Print one line on the terminal or into the job's log."""
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
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(values, step=iteration)
        self._progress.update(self._task, completed=iteration)
        self.say(self._line(fields))

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        """Append lines to one of the files; each has the `iteration` that it belongs to."""
        if name in self._files:
            self._files[name].writelines(json.dumps(_fields(row)) + "\n" for row in rows)
            self._files[name].flush()

    def sync(self) -> None:
        """Bring the JSONL files onto the disk; called before a checkpoint is published."""
        for file in self._files.values():
            os.fsync(file.fileno())


class NullLog:
    """A log that keeps nothing: that of all ranks but the first. Use as a context manager."""

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


def truncate_from(path: Path, iteration: int) -> None:
    """Cut a JSONL file before its first line of step `iteration` or later, and before a torn line."""
    if not path.is_file():
        return
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_before(line, iteration):
                break
            keep += len(line)
    os.truncate(path, keep)


def _is_before(line: bytes, iteration: int) -> bool:
    try:
        return bool(json.loads(line)["iteration"] < iteration)
    except (ValueError, KeyError, TypeError):
        return False
