"""When a run saves, what stays of its checkpoints, and whether there is room."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import structs

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.retention import Removal, Retention
from megatron_ssft.formats.run_folder import checkpoint_folder
from megatron_ssft.formats.train_state import RunState
from megatron_ssft.parallel.checkpoint.checkpoint_size import measure_size, shown, space_line
from megatron_ssft.parallel.checkpoint.run_checkpoint import CheckpointSave, begin_save
from megatron_ssft.parallel.collectives import any_rank, on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.training.folder_lease import FolderLease
from megatron_ssft.training.run_log import Log


class Saver:
    """The checkpoints of one run, on every rank. Collective throughout."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        log: Log,
        lease: FolderLease | None,
        export: Callable[[Path], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        """
        Args:
            export: writes the Hugging Face folder of a checkpoint, with --export-hf-at-save.
            is_stopping: whether a rank has got the signal to stop, the same answer on all. Collective.
        """
        assert config.checkpoint.save is not None
        self._checkpoint = config.checkpoint
        self._folder = Path(config.checkpoint.save)
        self._engine = engine
        self._topology = engine.topology
        self._log = log
        self._lease = lease
        self._export = export
        self._is_stopping = is_stopping
        self._unexported: Path | None = None
        """The newest checkpoint, where its export was put off."""
        self._size = measure_size(engine)
        self._retention: Retention | None = None
        if config.checkpoint.keep_last is not None:
            self._retention = Retention(self._folder, config.checkpoint.keep_last, config.checkpoint.keep_every)
        self._saved_at: int | None = None
        self._is_whole = True
        self._pending: CheckpointSave | None = None
        self._begun = 0.0
        self._longest_step = 0.0
        self._step_begun: float | None = None
        self._has_told_of_stops = False

    def begin(self, iteration: int, train_iters: int, *, is_saved: bool) -> None:
        """Say what the run will need.

        Args:
            is_saved: there is nothing to save yet: the checkpoint that the run goes on from is its own, or it begins.
        """
        self._saved_at = iteration if is_saved else None
        free = on_first_rank(lambda: shutil.disk_usage(self._folder).free, self._topology)
        self._log.say(space_line(self._checkpoint, self._size, iteration, train_iters, free))
        self._step_begun = time.perf_counter()

    def after_step(self, iteration: int, state: Callable[[], RunState]) -> None:
        """Publish the checkpoint under way where all ranks have written it, and begin one where it is due."""
        if self._step_begun is not None:
            self._longest_step = max(self._longest_step, time.perf_counter() - self._step_begun)
        if self._pending is not None and not any_rank(not self._pending.is_written, self._topology):
            self.finish()
        every = self._checkpoint.save_interval
        if every is not None and iteration % every == 0:
            self._save(iteration, state(), has_optimizer=self._checkpoint.save_optim, waits=False)
        self._step_begun = time.perf_counter()

    def end(self, iteration: int, state: Callable[[], RunState], *, is_stopped: bool) -> None:
        """Leave a checkpoint of the last step behind; where the run is to go on, one with the optimizer.

        Who stops a run gives it seconds, which a save may need and an export not take: that is made when it goes on.
        """
        self.finish()
        is_whole = self._checkpoint.save_optim or is_stopped
        if self._saved_at != iteration or (is_whole and not self._is_whole):
            if is_whole and not self._checkpoint.save_optim:
                self._log.say("the checkpoint of a stopped run holds the optimizer, in spite of --no-save-optim")
            self._save(iteration, state(), has_optimizer=is_whole, waits=True)
        elif iteration and self._checkpoint.continues_in_place:
            self._thin(iteration)  # what a kill kept from being removed
        if self._unexported is None:
            return
        if is_stopped:
            self._log.say(f"{self._unexported} is exported when the run goes on")
        else:  # the signal came within the last step, and nothing goes on
            self._export(self._unexported)

    def finish(self) -> None:
        """Publish the checkpoint under way, if there is one, once all ranks have written it. Raises UserError."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._topology.watch.phase("saving a checkpoint", slow=True):
            try:
                if self._lease is not None:
                    self._lease.check()
            except UserError:
                pending.abandon()
                raise
            folder = pending.finish()
        background = " in the background" if self._checkpoint.async_save else ""
        seconds = time.perf_counter() - self._begun
        self._log.say(f"saved {folder} ({seconds:.1f} s{background})")
        export_seconds = 0.0
        if self._checkpoint.export_hf_at_save and self._is_stopping():
            self._unexported = folder
        elif self._checkpoint.export_hf_at_save:
            begin = time.perf_counter()
            self._export(folder)
            export_seconds = time.perf_counter() - begin
            self._unexported = None
        self._tell_of_stops(seconds, export_seconds)
        self._thin(pending.iteration)

    def _tell_of_stops(self, save_seconds: float, export_seconds: float) -> None:
        """Say once what a stop takes, so that whoever stops the run leaves it the time."""
        if self._has_told_of_stops or not self._longest_step:
            return
        self._has_told_of_stops = True
        parts = [f"a step ({self._longest_step:.1f} s at most so far)", f"a save ({save_seconds:.1f} s)"]
        if export_seconds:
            parts.insert(1, f"an export that has begun ({export_seconds:.1f} s)")
        total = self._longest_step + export_seconds + save_seconds
        self._log.say(f"a SIGTERM takes up to {total:.0f} s from here on: {', '.join(parts[:-1])} and {parts[-1]}")

    def finish_after(self, error: UserError) -> None:
        """Publish the checkpoint under way although the run ends by an error, where all ranks do so together."""
        if error.shared:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self.finish()

    def _save(self, iteration: int, state: RunState, *, has_optimizer: bool, waits: bool) -> None:
        """Begin a checkpoint once the one before is published; `waits`, or without --async-save: and publish it."""
        in_background = self._checkpoint.async_save and not waits
        if self._pending is not None:
            begin = time.perf_counter()
            self.finish()
            self._log.say(
                f"waited {time.perf_counter() - begin:.1f} s for it: saves take longer than the steps between"
            )
        self._begun = time.perf_counter()
        if self._lease is not None:
            self._lease.check()
        on_first_rank(self._log.sync, self._topology)
        on_first_rank(lambda: self._refuse_small_disk(iteration, has_optimizer), self._topology)
        with self._topology.watch.phase("saving a checkpoint", slow=True):
            state = structs.replace(state, has_optimizer=has_optimizer)
            self._pending = begin_save(self._engine, self._folder, iteration, state, in_background=in_background)
        self._saved_at, self._is_whole = iteration, has_optimizer
        if not in_background:
            self.finish()

    def _refuse_small_disk(self, iteration: int, has_optimizer: bool) -> None:
        """Raise UserError, before anything is written, where the next checkpoint cannot fit."""
        needed = self._size.whole if has_optimizer else self._size.weights
        if self._checkpoint.export_hf_at_save:
            needed += self._size.weights
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            older = "; --keep-last removes older ones only when this one is complete" if self._retention else ""
            raise UserError(
                f"{checkpoint_folder(self._folder, iteration)}: the disk is full: it needs {shown(needed)} or more, "
                f"{shown(free)} are free{older}; nothing of it is written; make room, then go on with --load from the "
                "newest checkpoint"
            )

    def _thin(self, newest: int) -> None:
        """Remove the checkpoints that need not stay, now that `newest` is complete."""
        if self._retention is None:
            return
        retention = self._retention

        def thin() -> dict[str, object]:
            removal = retention.thin(newest)
            return {"line": _removal_line(removal)}

        with self._topology.watch.phase("removing checkpoints", slow=True):
            line = on_first_rank(thin, self._topology)["line"]
        if line:
            self._log.say(str(line))


def _removal_line(removal: Removal) -> str:
    """What was removed, for the log; empty where nothing is to be said."""
    lines = []
    if removal.removed:
        names = ", ".join(str(iteration) for iteration in reversed(removal.removed))
        lines.append(
            f"removed {len(removal.removed)} checkpoint{'s' if len(removal.removed) > 1 else ''} (step {names}), "
            f"{len(removal.kept)} stay (--keep-last)"
        )
    if removal.problem is not None:
        lines.append(f"--keep-last: {removal.problem}")
    return "; ".join(lines)
