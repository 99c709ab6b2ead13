"""The trainer: one loop for every objective. It steps, stops on SIGTERM, saves, exports and logs."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import msgspec

from megatron_ssft.config import SSFTConfig, TrainingRun, check_schedule
from megatron_ssft.config.flags import to_yaml
from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import ASSETS, checkpoint_folder, store_config
from megatron_ssft.formats.train_state import RunState
from megatron_ssft.hf.folder import is_hf_folder
from megatron_ssft.objectives.objective import Decision, Figures, Objective, Report, StepContext
from megatron_ssft.objectives.registry import objective_of
from megatron_ssft.parallel.checkpoint.choice import CheckpointChoice
from megatron_ssft.parallel.collectives import any_rank, on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import Topology, job_peak_flops
from megatron_ssft.records import StepMetrics
from megatron_ssft.scheduling.accounting import FlopAccountant
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.signals import StopSignal
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from megatron_ssft.training.beginning import Beginning, look_at_source
from megatron_ssft.training.export import export_hf
from megatron_ssft.training.folder_lease import FolderLease
from megatron_ssft.training.greeting import describe_job, describe_sequences, device_lines
from megatron_ssft.training.lr_schedule import learning_rate
from megatron_ssft.training.origin import OriginOfRun, origin_line
from megatron_ssft.training.packages import kernels_remark, refuse_missing
from megatron_ssft.training.pulse import Pulse
from megatron_ssft.training.resume import (
    check_writable,
    keep_assets,
    refuse_occupied_folder,
    resumable,
    whole_state,
)
from megatron_ssft.training.run_log import Log, NullLog, RunLog
from megatron_ssft.training.saving import Saver
from megatron_ssft.training.step_meter import StepMeter
from megatron_ssft.training.trackers import check_trackers
from megatron_ssft.training.weights import refuse_other_shape, refuse_start_of_known_tags, rows_remark


class Trainer:
    """One training run on one rank. Everything but the model's shards is the same on every rank."""

    def __init__(
        self,
        config: TrainingRun,
        topology: Topology,
        objective: type[Objective] | None = None,
        choice: CheckpointChoice | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        """Check and open all input, then build the model. Raises UserError before any of it is slow.

        Args:
            objective: by default the one that the configuration asks for.
            choice: of the checkpoints to load; by default one of its own.
            pulse: tells that the run lives; by default nobody does.
        """
        self.config = config
        self.topology = topology
        refuse_occupied_folder(config)
        on_first_rank(lambda: check_writable(config), topology)
        self.pulse = pulse
        if pulse is not None:
            pulse.begin()
        on_first_rank(lambda: refuse_missing(config.run, topology.device), topology)
        on_first_rank(lambda: check_trackers(config.run.logging, config.run.checkpoint.save), topology)
        remark = kernels_remark(config.run, topology.device)
        if remark is not None and topology.is_first_rank:
            print(remark, flush=True)
        self._origin: OriginOfRun | None = None
        on_first_rank(self._look_at_origin, topology)
        self.vocabulary = build_vocabulary(config.run, config.start)
        refuse_start_of_known_tags(config, self.vocabulary)
        self.objective = (objective or objective_of(config))(config, self.vocabulary, topology)
        self.choice = choice or CheckpointChoice(config.run.checkpoint, topology)
        look_at_source(config, self.objective, self.choice)
        on_first_rank(lambda: keep_assets(config), topology)
        on_first_rank(lambda: refuse_other_shape(config.run.checkpoint.load, config.run.model), topology)
        self.engine = Engine(config.run, topology, self.vocabulary.size, self.vocabulary.tags.row_ids)
        cost_tokens = config.cost_tokens_per_microbatch if isinstance(config, SSFTConfig) else None
        self.planner = Planner(config.run, self.vocabulary.size, topology.dp_size, cost_tokens)
        self.accountant = FlopAccountant(self.planner.flops)
        self.peak_flops = job_peak_flops(config.run, topology)
        self.iteration = 0
        """Optimizer steps done."""
        self.train_iters = self.objective.train_iters(0)
        """Optimizer steps of the whole run."""
        check_schedule(config.run.training, self.train_iters)
        self._meter = StepMeter(self.engine)
        self.beginning = Beginning(config, self.vocabulary, self.objective, self.engine, self.choice)
        self._begin_or_go_on()

    def _begin_or_go_on(self) -> None:
        """Put weights into the model, and go on where they come from a run that is continued."""
        resumed_at = self.beginning.start_or_resume()
        if resumed_at is None:
            self.objective.begin(self.context(), self.beginning.load_weights)
        else:
            self.iteration = resumed_at
            self.train_iters = self.objective.train_iters(resumed_at)

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[Decision, Figures]:
        """Ask the objective, take the optimizer's step; what was decided and the line of metrics.jsonl."""
        begin = time.perf_counter()
        with self.engine.clock.part("data"):  # but for what is scored in it
            decision = self.objective.decide(self.context())
        metrics = self.engine.train(decision.terms, self.learning_rate())
        row = self._row(decision, metrics)
        self.iteration += 1
        row["seconds"] = time.perf_counter() - begin - decision.aside_seconds
        return decision, row | self._flops(decision, row["seconds"])

    def context(self) -> StepContext:
        """What the objective may use at the present step."""
        return StepContext(self.iteration, self.train_iters, self.engine, self.planner)

    def learning_rate(self) -> float:
        """Learning rate of the step that is being made."""
        return learning_rate(self.config.run.training, self.iteration + 1, self.train_iters)

    def _row(self, decision: Decision, metrics: StepMetrics) -> Figures:
        """A line of metrics.jsonl, without times. What an objective says of the loss takes the engine's place."""
        plans = [term.planned.plan for term in decision.terms]
        return {
            "iteration": self.iteration + 1,
            "loss": metrics.loss,
            "lr": self.learning_rate(),
            "grad_norm": metrics.grad_norm,
            **decision.figures(metrics.figures),
            "pad_sequences": sum(plan.pad_sequences for plan in plans),
            "makespan_over_bound": max(plan.makespan / plan.makespan_lower_bound for plan in plans),
            **({"pipeline_idle_share": self.planner.idle_share(plans)} if self.planner.pipeline.stages > 1 else {}),
            "questions": decision.questions,
            "trained_sequences": metrics.trained_sequences,
            "trained_tokens": metrics.trained_tokens,
        }

    def _flops(self, decision: Decision, seconds: float) -> Figures:
        """FLOPs of the step, and its MFU where the GPU is known; those of a partly frozen model are not counted."""
        if self.engine.last_layers is not None:
            return {}
        training = sum(self.accountant.training(term.planned.plan) for term in decision.terms)
        figures: Figures = {"training_flops": training}
        if self.peak_flops is not None:
            figures["mfu"] = (training + decision.scoring_flops) / (seconds * self.peak_flops)
        return figures

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, stop: StopSignal, lease: FolderLease | None = None) -> None:
        """Train to the end, or to a SIGTERM, and leave a checkpoint behind. Raises UserError.

        Args:
            lease: on the --save folder; where another job has taken it, nothing is saved any more.
        """
        checkpoint = self.config.run.checkpoint
        folder = self.folder if checkpoint.save and self.topology.is_first_rank else None
        with self.topology.watch.phase("between steps"), self._open_log(folder) as log:
            self._greet(log, folder)
            if self.pulse is not None:
                self.pulse.step(self.iteration, self.train_iters)
            saver = self._saver(stop, log, lease) if checkpoint.save else None
            if checkpoint.continues_in_place and self._export_is_missing():
                self._export(log, checkpoint_folder(self.folder, self.iteration))
            try:
                stopped = self._train(stop, log, saver)
            except UserError as error:
                if saver is not None:
                    saver.finish_after(error)
                raise
            if saver is not None:
                saver.end(self.iteration, self.state, is_stopped=stopped)
            any_rank(False, self.topology, log.failure)
            if self.pulse is not None:
                self.pulse.end(is_stopped=stopped)
            end = "stopped by SIGTERM" if stopped else "finished"
            log.say(f"{end} at step {self.iteration} of {self.train_iters}")
        self.objective.end(self.context())

    def _saver(self, stop: StopSignal, log: Log, lease: FolderLease | None) -> Saver:
        """What saves the run, told what is saved already."""
        export = functools.partial(self._export, log)
        saver = Saver(
            self.config.run,
            self.engine,
            log,
            lease,
            export,
            lambda: any_rank(stop.received, self.topology, log.failure),
        )
        # Before the first step there is nothing to save: the command that started the run starts it anew.
        is_saved = self.config.run.checkpoint.continues_in_place or not self.iteration
        saver.begin(self.iteration, self.train_iters, is_saved=is_saved)
        return saver

    def _train(self, stop: StopSignal, log: Log, saver: Saver | None) -> bool:
        """Make the steps that are left; whether a SIGTERM came before their end."""
        self._meter.begin()
        while self.iteration < self.train_iters and not self.objective.is_over():
            if any_rank(stop.received, self.topology, log.failure):
                return True
            self._advance(log)
            if saver is not None:
                with self.engine.clock.part("save"):
                    saver.after_step(self.iteration, self.state)
        return False

    def _advance(self, log: Log) -> None:
        """A step, and its lines in the log."""
        watch = self.topology.watch
        watch.begin_step(self.iteration + 1)
        with watch.phase("before the step"), self.engine.clock.part("evaluation"):
            report = self.objective.before_step(self.context())
        with watch.phase("writing the log"):
            self._write(log, report)
        with watch.phase("deciding and training"):
            decision, row = self.train_step()
        with watch.phase("after the step"), self.engine.clock.part("evaluation"):
            report = self.objective.after_step(self.context(), decision)
        with watch.phase("writing the log"):
            figures, slow = self._meter.end_step()
            self._write(log, report, row | figures)
            if self.pulse is not None:
                self.pulse.step(self.iteration, self.train_iters, row["loss"])
            if slow is not None:
                log.say(slow)

    def _write(self, log: Log, report: Report, row: Figures | None = None) -> None:
        for file, rows in report.rows:
            log.rows(file, rows)
        if row is not None and self.topology.is_first_rank:
            figures = row | report.figures
            record = self.objective.metrics
            log.step(figures if record is None else msgspec.convert(figures, record))
        for remark in report.remarks:
            log.say(remark)

    def _open_log(self, folder: Path | None) -> RunLog | NullLog:
        """JSONL files, trackers and progress; nothing on ranks other than the first. Collective. Raises UserError."""
        opened: list[RunLog] = []

        def open_log() -> None:
            log = RunLog(
                folder,
                self.config.run.logging,
                self.iteration + 1,
                self.train_iters,
                files=self.objective.log_files,
                line=self.objective.line,
                is_continued=self.config.run.checkpoint.continues_in_place,
            )
            opened.append(log)

        on_first_rank(open_log, self.topology)
        return opened[0] if opened else NullLog()

    def _greet(self, log: Log, folder: Path | None) -> None:
        """What is trained, on what, how; and the configuration that a later run goes on with."""
        log.say(on_first_rank(lambda: self._keep_config(folder), self.topology))
        for change in self.beginning.changes:
            log.say(change)
        job = describe_job(self.engine, self.vocabulary, self.iteration, self.train_iters)
        log.say(f"{self.objective.introduction()} | {job}")
        log.say(describe_sequences(self.engine))
        for line in device_lines(self.config.run, self.topology.device):
            log.say(line)
        load = self.config.run.checkpoint.load
        if load is not None and is_hf_folder(Path(load)) and (remark := rows_remark(self.vocabulary, Path(load))):
            log.say(remark)
        for note in (*self.vocabulary.tokenizer.remarks, *self.objective.notes()):
            log.say(note)

    def _look_at_origin(self) -> None:
        self._origin = OriginOfRun(self.config)

    def _keep_config(self, folder: Path | None) -> str:
        """Write the configuration with the origin of the weights; in words, what that is. For the first rank."""
        assert self._origin is not None, "looked at before"
        load = self.config.run.checkpoint.load
        taken = None if load is None else self.choice.taken_of(Path(load))
        resumed_at = self.beginning.resumed_at
        origin = self._origin.find(resumed_at, taken)
        if folder is not None:
            store_config(folder, self.iteration, to_yaml(resumable(self.config, origin)))
        return origin_line(self.config.run, resumed_at, taken, origin.fingerprint)

    @property
    def folder(self) -> Path:
        """The --save folder of a run that has one."""
        assert self.config.run.checkpoint.save is not None
        return Path(self.config.run.checkpoint.save)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """What a checkpoint stores besides weights and optimizer."""
        return whole_state(self.config, self.vocabulary, self.objective, self.iteration)

    def _export_is_missing(self) -> bool:
        """Whether the checkpoint that the run goes on from was not exported any more before a kill."""
        if not self.config.run.checkpoint.export_hf_at_save:
            return False
        export = checkpoint_folder(self.folder, self.iteration) / ASSETS
        return not on_first_rank(export.is_dir, self.topology)

    def _export(self, log: Log, folder: Path) -> None:
        begin = time.perf_counter()
        with self.topology.watch.phase("exporting", slow=True):
            report = export_hf(
                self.engine,
                self.config.run,
                self.vocabulary,
                assets=self.folder / ASSETS,
                target=folder / ASSETS,
                verify_with=folder if self.config.run.checkpoint.verify_hf else None,
            )
        verified = f"verified: {report}" if report is not None else "not verified"
        log.say(f"exported {folder / ASSETS} ({time.perf_counter() - begin:.1f} s), {verified}")
