"""The run's signs of life in heartbeat.json: at every step, and from a thread during long work between steps."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ssft.config import ParallelConfig
from megatron_ssft.errors import LostRank, UserError, is_full_disk
from megatron_ssft.formats.heartbeat import HEARTBEAT, Heartbeat, write_bytes, write_heartbeat
from megatron_ssft.formats.lease import this_process
from megatron_ssft.parallel.watch.watch import Watch
from megatron_ssft.training.folder_lease import FolderLease

BEAT_SECONDS = 10.0
"""The thread writes where nothing was written for so long."""
EXPECTED_SECONDS = 60.0
"""A run whose file is older is silent. Native code may hold up the thread for a moment."""
_CRASHED = 1
"""Python's exit status of an exception that nobody caught."""


class Pulse:
    """Writes the heartbeat of a run. Ranks but the first, and runs without --save, have one that writes nothing."""

    def __init__(self, folder: Path | None, watch: Watch, parallel: ParallelConfig, lease: FolderLease) -> None:
        """`folder`: the run's; None: there is nothing to write."""
        self._folder = folder
        self._watch = watch
        self._limits = 60 * parallel.distributed_timeout_minutes, 60 * parallel.slow_work_timeout_minutes
        self._lease = lease
        self._process = this_process()
        self._lock = threading.Lock()
        self._has_begun = self._has_ended = False
        self._before: bytes | None = None
        """The heartbeat that a run had left here."""
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._written_at = 0.0
        self._moves, self._progressed_at = -1, time.time()
        self._iteration = 0
        self._train_iters: int | None = None
        self._loss: float | None = None

    def begin(self) -> None:
        """Begin to write: the folder is this run's."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._before = (self._folder / HEARTBEAT).read_bytes()
        self._has_begun = True
        self._write("running")
        self._watch.last_words = lambda text: self.fail(LostRank.status, text)
        self._beat.start()

    def step(self, iteration: int, train_iters: int, loss: float | None = None) -> None:
        """A step is done, or a run goes on from one."""
        self._iteration, self._train_iters = iteration, train_iters
        self._loss = loss if loss is not None and math.isfinite(loss) else None
        self._write("running")

    def end(self, *, is_stopped: bool) -> None:
        """The run has come to its end, or was stopped and can go on."""
        self._end("stopped" if is_stopped else "done", 0, None)

    def fail(self, status: int, message: str) -> None:
        """The run ends with this status."""
        self._end("failed", status, message)

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Tell of an error that ends the `with` block, and then stop."""
        try:
            yield
        except UserError as error:
            if error.status == UserError.status and self._train_iters is None:
                self._withdraw()
            self.fail(error.status, str(error))
            raise
        except OSError as error:
            self.fail(UserError.status if is_full_disk(error) else _CRASHED, f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:
            self.fail(_CRASHED, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._stop.set()
            if self._beat.is_alive():
                self._beat.join()

    def _withdraw(self) -> None:
        """A start that is refused changes nothing: leave the folder as it was."""
        if self._folder is None or not self._has_begun:
            return
        with self._lock:
            self._has_ended = True
            with contextlib.suppress(OSError):
                if self._lease.is_lost:
                    return
                if self._before is None:
                    (self._folder / HEARTBEAT).unlink(missing_ok=True)
                else:
                    write_bytes(self._folder, self._before)

    def _end(self, state: str, status: int, message: str | None) -> None:
        self._stop.set()
        self._write(state, status=status, message=message)

    def _run(self) -> None:
        while not self._stop.wait(max(0.1, self._written_at + BEAT_SECONDS - time.time())):
            if time.time() - self._written_at >= BEAT_SECONDS:
                self._write("running")

    def _write(self, state: str, **end: Any) -> None:
        with self._lock:
            if self._folder is None or not self._has_begun or self._has_ended:
                return
            self._has_ended = state != "running"
            self._written_at = time.time()
            # A disk that is full, or away for a moment: the log and the checkpoint speak of it, and whoever looks at
            # the heartbeat sees that it does not change.
            with contextlib.suppress(OSError):
                if self._lease.is_lost:
                    return  # it is another job's folder by now
                write_heartbeat(self._folder, self._heartbeat(state, end))

    def _heartbeat(self, state: str, end: Mapping[str, Any]) -> Heartbeat:
        place, process = self._watch.place, self._process
        if place.moves != self._moves:
            self._moves, self._progressed_at = place.moves, self._written_at
        return Heartbeat(
            time=self._written_at,
            state=state,  # type: ignore[arg-type]
            iteration=self._iteration,
            train_iters=self._train_iters,
            phase=str(place),
            loss=self._loss,
            host=process.host,
            pid=process.pid,
            job_id=_job_id(os.environ),
            expected_next_seconds=EXPECTED_SECONDS,
            progressed_at=self._progressed_at,
            limit_seconds=self._limits[place.is_slow],
            process_started=process.started,
            process_space=process.pid_space,
            **end,
        )


def _job_id(environment: Mapping[str, str]) -> str | None:
    """By what the job is addressed: a task of an array has an id of its own."""
    array, task = (environment.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    if array and task:
        return f"{array}_{task}"
    run = environment.get("TORCHELASTIC_RUN_ID", "none")
    return environment.get("SLURM_JOB_ID") or (run if run != "none" else None)
