"""The training loop. `train_step` is the paper's Algorithm 1."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_ssft.config import Config
from megatron_ssft.config.flags import to_yaml
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.run_folder import find_latest
from megatron_ssft.layouts.padded import loss_denominator
from megatron_ssft.matching.assignment import assignment_gap
from megatron_ssft.matching.collapse import CollapseWatch
from megatron_ssft.parallel.checkpoint.hf import load_hf_weights
from megatron_ssft.parallel.checkpoint.run_checkpoint import load_checkpoint, read_state
from megatron_ssft.parallel.collectives import on_first_rank, raise_together
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows, initialize_weights
from megatron_ssft.parallel.topology import Topology, job_peak_flops
from megatron_ssft.records import Assignment, MicrobatchPlan, QuestionBatch, QuestionVisit, StepMetrics
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.training.loop import TrainingLoop
from megatron_ssft.training.lr_schedule import learning_rate
from megatron_ssft.training.resume import (
    check_writable,
    keep_assets,
    refuse_contradictions,
    refuse_occupied_folder,
    resumable,
    run_state,
)
from megatron_ssft.training.run_log import NoLog, RunLog
from megatron_ssft.training.set_matching import Matched, SetMatching, matching_figures
from megatron_ssft.training.setup import build_queue, build_vocabulary, prepare_data
from megatron_ssft.training.startup import is_hf_folder


class Trainer(TrainingLoop):
    """One training run on one rank. Everything but the model's shards is the same on every rank."""

    def __init__(self, config: Config, topology: Topology) -> None:
        """Check and open the data, then build the model. Raises UserError before any of it is slow."""
        self.config = config
        self.topology = topology
        refuse_occupied_folder(config)
        on_first_rank(lambda: check_writable(config), topology)
        self.vocabulary = build_vocabulary(config)
        if self.vocabulary.tags.num_tags == 0:
            raise UserError("--num-forking-tokens 0: there is nothing to train the traces under; give at least 1")
        folders = on_first_rank(lambda: prepare_data(config, self.vocabulary), topology)
        on_first_rank(lambda: keep_assets(config), topology)
        self.dataset = open_everywhere(folders["train"], topology)
        self.eval_dataset = open_everywhere(folders["eval"], topology) if "eval" in folders else None
        self.queue = build_queue(config, self.dataset)
        self.train_iters = config.training.train_iters or self.queue.remaining_batches()
        tags, size = self.vocabulary.tags, self.vocabulary.size
        self.engine = Engine(config, topology, tags, size)
        self.planner = Planner(config, tags, size, topology.dp_size)
        self.matching = SetMatching(config, topology, self.engine, self.planner, tags.num_tags)
        self.peak_flops = job_peak_flops(config, topology)
        self.watch = CollapseWatch(tags.num_tags, mode=config.matching.matching, seed=config.training.seed)
        self._start_or_resume()

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[QuestionBatch, list[Assignment], dict[str, object]]:
        """Algorithm 1 of the paper: score every trace under every tag, match, train under the matched tags."""
        begin = time.perf_counter()
        batch = self.next_batch()
        matched = self.matching.match(batch, self.iteration)
        plan = self.planner.train(batch, matched.assignments)
        denominator = self._denominator(batch, matched.assignments)
        metrics = self.engine.train(batch, plan, denominator, self.learning_rate())
        self.iteration += 1
        aside = matched.figures.get("exact_matching_seconds", 0.0)  # for the log alone
        seconds = time.perf_counter() - begin - aside
        return batch, matched.assignments, self._row(batch, matched, plan, metrics, seconds)

    def next_batch(self) -> QuestionBatch:
        """The questions of the next step."""
        visits = self.queue.next_batch()
        assert visits is not None, "the run is longer than its data"
        return self._batch(self.dataset, visits)

    # -- the loop ------------------------------------------------------------------------------------------------

    def advance(self, log: RunLog | None) -> None:
        """A step, an evaluation where one is due, and their lines."""
        batch, assignments, row = self.train_step()
        if self._evaluation_is_due():
            row |= self.evaluate()
        if log is None:
            return
        warnings = self.watch.update(assignments, [s.sources for s in batch.sets])
        log.assignments(self.iteration, batch, assignments)
        log.step(row | self.watch.figures)
        for warning in warnings:
            log.say(warning)

    def evaluate(self) -> dict[str, float]:
        """Loss on the held-out questions, each trace under its matched tag, with the matching's own figures."""
        loss = denominator = cost = gap = 0.0
        limit = self.config.logging.eval_questions or len(self.eval_dataset)
        for visits in _in_batches(self.eval_dataset, limit, self.config.training.global_batch_size):
            batch = self._batch(self.eval_dataset, visits)
            assignments = self.matching.optimal(batch)
            plan = self.planner.train(batch, assignments)
            share = self._denominator(batch, assignments)
            loss += self.engine.evaluate(batch, plan, share) * share
            denominator += share
            if self.config.matching.matching != "single":
                cost += sum(a.cost for a in assignments)
                gap += sum(assignment_gap(a.cost_NM) for a in assignments)
        questions = min(limit, len(self.eval_dataset))
        result = {"eval_loss": loss / denominator}
        if self.config.matching.matching != "single":
            result |= {"eval_matching_cost": cost / questions, "eval_matching_gap": gap / questions}
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _start_or_resume(self) -> None:
        config = self.config
        run = None if config.checkpoint.load is None else Path(config.checkpoint.load)
        if run is None or is_hf_folder(run):
            initialize_weights(self.engine.chunks, config) if run is None else load_hf_weights(self.engine, run)
            rows, start_from = self.vocabulary.known_rows, self.vocabulary.copy_id
            initialize_forking_rows(self.engine.chunks, self.vocabulary.tags, rows, start_from, config)
            self.engine.start()
            return
        iteration = int(on_first_rank(lambda: find_latest(run), self.topology))
        state = on_first_rank(lambda: read_state(run, iteration), self.topology)
        weights_only = config.checkpoint.finetune or not state.get("has_optimizer", True)
        refuse_contradictions(run, state, self.state(), weights_only)
        self.engine.start()
        load_checkpoint(self.engine, run, iteration, weights_only)
        if not weights_only:
            self.queue.load_state_dict(state["queue"])
            if "reused_assignments" in state:
                self.matching.store.load_state_dict(state["reused_assignments"])
            if "collapse_watch" in state:
                self.watch.load_state_dict(state["collapse_watch"])
            self.iteration = iteration
            if config.training.train_iters is None:  # the batch size may have changed since
                self.train_iters = iteration + self.queue.remaining_batches()

    def state(self) -> dict[str, object]:
        state = run_state(self.config, self.vocabulary, self.dataset, self.queue, self.iteration)
        watch = self.watch.state_dict()  # kept by the first rank, which writes the checkpoint
        return state | {"reused_assignments": self.matching.store.state_dict(), "collapse_watch": watch}

    # -- small things --------------------------------------------------------------------------------------------

    def _batch(self, dataset: SetDataset, visits: tuple[QuestionVisit, ...]) -> QuestionBatch:
        return QuestionBatch(visits=visits, sets=tuple(dataset[visit.index] for visit in visits))

    def _denominator(self, batch: QuestionBatch, assignments: list[Assignment]) -> int:
        return loss_denominator(
            batch,
            assignments,
            self.vocabulary.tags,
            train_forking_token=self.config.data.train_forking_token,
            loss_normalization=self.config.training.loss_normalization,
        )

    def _evaluation_is_due(self) -> bool:
        if self.eval_dataset is None:
            return False
        every = self.config.logging.eval_interval
        return self.iteration == self.train_iters or (every is not None and self.iteration % every == 0)

    def _row(
        self, batch: QuestionBatch, matched: Matched, plan: MicrobatchPlan, metrics: StepMetrics, seconds: float
    ) -> dict[str, object]:
        """A line of metrics.jsonl. Costs are in nats a question: totals over its traces, averaged over questions."""
        training_flops = self.matching.accountant.training(plan)
        row = {
            "iteration": self.iteration,
            "loss": metrics.loss,
            "lr": learning_rate(self.config.training, self.iteration, self.train_iters),
            "grad_norm": metrics.grad_norm,
            **matching_figures(matched.assignments),
            "pad_sequences": plan.pad_sequences,
            "pad_lower_bound": plan.pad_lower_bound,
            "makespan_over_bound": plan.makespan / plan.makespan_lower_bound,
            "questions": len(batch.sets),
            "trained_sequences": metrics.trained_sequences,
            "trained_tokens": metrics.trained_tokens,
            "sequence_tokens": sum(s.num_tokens for s in plan.sequences),
            "epoch": batch.visits[0].epoch,
            "seconds": seconds,
            "matching_seconds": matched.seconds,
            "solving_seconds": matched.solving_seconds,
            "training_flops": training_flops,
            "matching_flops": matched.flops,
            **matched.figures,
        }
        if self.peak_flops is not None:
            row["mfu"] = (training_flops + matched.flops) / (seconds * self.peak_flops)
        return row

    def open_log(self, folder: Path | None) -> RunLog | NoLog:
        """JSONL files, trackers and progress."""
        if not self.topology.is_first_rank:
            return NoLog()
        return RunLog(folder, self.config.logging, self.iteration + 1, self.train_iters)

    def greet(self, log: RunLog, folder: Path | None) -> None:
        """What is trained, on what, how."""
        if folder is not None:
            write_durably(folder / "config.yaml", to_yaml(resumable(self.config)))
        log.say(f"{len(self.dataset)} questions, {int(self.dataset.trace_counts.sum())} traces | {self.describe_job()}")
        log.say(self.describe_layout())


def open_everywhere(folder: str, topology: Topology) -> SetDataset:
    """The data set, or the same UserError on all ranks if one cannot see what the first has written."""
    dataset, error = None, None
    try:
        dataset = SetDataset.open(folder)
    except UserError as failure:
        error = f"{failure} (on rank {topology.rank}; all nodes must see the folder, see --data-cache-path)"
    raise_together(error, topology)
    return dataset


def _in_batches(dataset: SetDataset, limit: int, capacity: int) -> list[tuple[QuestionVisit, ...]]:
    """The first `limit` questions in file order, in runs of at most `capacity` traces."""
    batches: list[list[QuestionVisit]] = []
    traces = capacity
    for index, count in enumerate(dataset.trace_counts[:limit].tolist()):
        if traces + count > capacity:
            batches.append([])
            traces = 0
        batches[-1].append(QuestionVisit(index=index, epoch=0))
        traces += count
    return [tuple(batch) for batch in batches]
