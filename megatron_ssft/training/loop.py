"""What every training run does besides its steps: the loop, the stop on SIGTERM, checkpoints, exports, the log."""

from __future__ import annotations

import abc
import time
from pathlib import Path

from megatron_ssft.config import Config
from megatron_ssft.formats.run_folder import ASSETS, checkpoint_folder
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.collectives import any_rank, on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.training.export import export_hf
from megatron_ssft.training.lr_schedule import learning_rate
from megatron_ssft.training.resume import continues_in_place
from megatron_ssft.training.run_log import NoLog, RunLog
from megatron_ssft.training.setup import Vocabulary
from megatron_ssft.training.signals import StopSignal


class TrainingLoop(abc.ABC):
    """One training run on one rank. Subclasses build what is declared here and say what a step is."""

    config: Config
    topology: Topology
    engine: Engine
    vocabulary: Vocabulary
    iteration: int = 0
    """Optimizer steps done."""
    train_iters: int
    """Optimizer steps of the whole run."""

    @abc.abstractmethod
    def advance(self, log: RunLog | None) -> None:
        """One step, and its lines in the log (None on all ranks but the first). Counts `iteration` up."""

    @abc.abstractmethod
    def state(self) -> dict[str, object]:
        """What a checkpoint stores besides weights and optimizer, as JSON."""

    @abc.abstractmethod
    def open_log(self, folder: Path | None) -> RunLog | NoLog:
        """The log of this rank."""

    @abc.abstractmethod
    def greet(self, log: RunLog, folder: Path | None) -> None:
        """First lines of the log, on the first rank."""

    def is_over(self) -> bool:
        """Whether the run is to end before its last step; the same answer on every rank."""
        return False

    def run(self, stop: StopSignal) -> None:
        """Train to the end, or to a SIGTERM, and leave a checkpoint behind. Raises UserError."""
        config = self.config
        folder = Path(config.checkpoint.save) if config.checkpoint.save and self.topology.is_first_rank else None
        # Before the first step there is nothing to save: the command that started the run starts it anew.
        saved_at = self.iteration if continues_in_place(config) or not self.iteration else -1
        with self.open_log(folder) as log:
            if log is not None:
                self.greet(log, folder)
            if continues_in_place(config) and self._export_is_missing():
                self._export(checkpoint_folder(Path(config.checkpoint.save), self.iteration), log)
            stopped = False
            while self.iteration < self.train_iters and not self.is_over():
                if stopped := any_rank(stop.received, self.topology):
                    break
                self.advance(log)
                if self._save_is_due():
                    saved_at = self._save(log)
            if config.checkpoint.save and saved_at != self.iteration:
                self._save(log)
            if log is not None:
                end = "stopped by SIGTERM" if stopped else "finished"
                log.say(f"{end} at step {self.iteration} of {self.train_iters}")

    def learning_rate(self) -> float:
        """Of the step that is being made."""
        return learning_rate(self.config.training, self.iteration + 1, self.train_iters)

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.save_interval
        return every is not None and self.iteration % every == 0

    def _export_is_missing(self) -> bool:
        """Whether the checkpoint that the run goes on from was not exported any more before a kill."""
        if not self.config.checkpoint.export_hf_at_save:
            return False
        export = checkpoint_folder(Path(self.config.checkpoint.save), self.iteration) / ASSETS
        return not on_first_rank(export.is_dir, self.topology)

    def _save(self, log: RunLog | None) -> int:
        begin = time.perf_counter()
        if log is not None:
            log.sync()
        folder = save_checkpoint(self.engine, Path(self.config.checkpoint.save), self.iteration, self.state())
        if log is not None:
            log.say(f"saved {folder} ({time.perf_counter() - begin:.1f} s)")
        if self.config.checkpoint.export_hf_at_save:
            self._export(folder, log)
        return self.iteration

    def _export(self, folder: Path, log: RunLog | None) -> None:
        begin = time.perf_counter()
        report = export_hf(
            self.engine,
            self.config,
            self.vocabulary,
            assets=Path(self.config.checkpoint.save) / ASSETS,
            target=folder / ASSETS,
            verify_with=folder if self.config.checkpoint.verify_hf else None,
        )
        if log is not None:
            verified = f"verified: {report}" if report is not None else "not verified"
            log.say(f"exported {folder / ASSETS} ({time.perf_counter() - begin:.1f} s), {verified}")

    def describe_job(self) -> str:
        """Vocabulary, ranks, parameters and steps, for the first line of a log."""
        t, p = self.topology, self.config.parallel
        steps = f"steps {self.iteration + 1} to {self.train_iters}"
        return (
            f"{self.vocabulary.size} vocabulary entries, {self.vocabulary.tags.num_tags} of them tags | "
            f"{t.world_size} ranks: tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} "
            f"x context {p.context_parallel_size} x data {t.dp_size} on {t.device.type} | "
            f"{self.engine.num_parameters} parameters on the first rank | "
            f"{steps if self.iteration < self.train_iters else 'no step left'}"
        )

    def describe_layout(self) -> str:
        """How sequences are laid out, and the attention's kernel."""
        layout, attention = self.config.training.sequence_layout, self.engine.attention
        kernel = "" if layout == "padded" else f" | attention of streams through {attention.name} ({attention.why})"
        return f"{layout} sequences{kernel}"
