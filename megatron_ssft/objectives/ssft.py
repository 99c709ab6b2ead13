"""Set Supervised Fine-Tuning, the paper's Algorithm 1: score every trace under every tag, match, train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import UnsetType, structs

from megatron_ssft.config import SSFTConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.assignments import ASSIGNMENTS, assignment_rows
from megatron_ssft.formats.metrics import METRICS, SSFTMetrics
from megatron_ssft.formats.train_state import RunState, SSFTState, WeightsState
from megatron_ssft.layouts.padded import loss_denominator
from megatron_ssft.matching.assignment import assignment_gap
from megatron_ssft.matching.collapse import CollapseWatch
from megatron_ssft.objectives.objective import Decision, Figures, Objective, Report, StepContext
from megatron_ssft.objectives.set_matching import Matched, SetMatching, matching_figures
from megatron_ssft.objectives.sets import HELD_OUT_DATA, TRAINING_DATA, TrainingSets, build_queue, data_notes
from megatron_ssft.objectives.step_lines import step_line
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared, weighted_nll
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import Assignment, Microbatch, ModelInput, PlannedBatch, QuestionBatch, SequenceCut
from megatron_ssft.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class SetDecision(Decision):
    """A step of SSFT."""

    batch: QuestionBatch
    assignments: list[Assignment]


class SSFT(Objective[SSFTConfig, SetDecision]):
    """Each trace of a question is trained under the tag that an optimal matching gives it."""

    log_files = (METRICS, ASSIGNMENTS)
    metrics = SSFTMetrics

    def __init__(self, config: SSFTConfig, vocabulary: Vocabulary, topology: Topology) -> None:
        super().__init__(config, vocabulary, topology)
        self.tags = vocabulary.tags
        if self.tags.num_tags == 0:
            raise UserError("--num-forking-tokens 0: there is nothing to train the traces under; give at least 1")
        self.sets = TrainingSets(config, vocabulary, topology)
        self.matching = SetMatching(config, self.tags)
        self.watch = CollapseWatch(self.tags.num_tags, mode=config.matching.matching, seed=config.run.training.seed)
        self.cut = SequenceCut(
            train_forking_token=config.data.train_forking_token,
            loss_normalization=config.batches.loss_normalization,
        )

    # -- Algorithm 1 ---------------------------------------------------------------------------------------------

    def decide(self, step: StepContext) -> SetDecision:
        """One iteration of Algorithm 1, up to the gradient."""
        batch = self.sets.next_batch()
        matched = self.matching.match(step, batch)  # matching costs and optimal assignments, equations 3-4
        planned = self.plan(step, batch, matched.assignments)
        term = self.set_loss(planned, matched.assignments)  # equation 5
        return SetDecision(
            terms=[term],
            figures=lambda sums: self._figures(matched, planned),
            questions=len(batch.sets),
            scoring_flops=matched.flops,
            aside_seconds=matched.figures.get("exact_matching_seconds", 0.0),
            batch=batch,
            assignments=matched.assignments,
        )

    def plan(self, step: StepContext, batch: QuestionBatch, assignments: Sequence[Assignment]) -> PlannedBatch:
        """The full traces under their matched tags, spread over ranks and microbatches."""
        return step.planner.plan_sequences(batch, assignments, self.tags, self.cut)

    def set_loss(self, planned: PlannedBatch, assignments: Sequence[Assignment]) -> LossTerm:
        """The set loss, equation 5: NLL of the full traces under their matched tags, averaged over the global batch."""
        denominator = self.denominator(planned.batch, assignments)

        def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
            return model_input, (model_input.weights / np.float32(denominator),)

        return LossTerm(planned, prepare, weighted_nll)

    def denominator(self, batch: QuestionBatch, assignments: Sequence[Assignment]) -> int:
        """What the summed loss of a batch is divided by: scored tokens, or sequences (--loss-normalization)."""
        return loss_denominator(
            batch,
            assignments,
            self.tags,
            train_forking_token=self.cut.train_forking_token,
            loss_normalization=self.cut.loss_normalization,
        )

    def _figures(self, matched: Matched, planned: PlannedBatch) -> Figures:
        return {
            **matching_figures(matched.assignments),
            "pad_lower_bound": planned.plan.pad_lower_bound,
            "truncated_share": truncated_share(planned.batch),
            "sequence_tokens": sum(s.num_tokens for s in planned.plan.sequences),
            "epoch": planned.batch.visits[0].epoch,
            "matching_seconds": matched.seconds,
            "solving_seconds": matched.solving_seconds,
            "matching_flops": matched.flops,
            **matched.figures,
        }

    # -- held-out questions and the log --------------------------------------------------------------------------

    def after_step(self, step: StepContext, decision: SetDecision) -> Report:
        """The evaluation where one is due, the matchings, and the collapse alarm."""
        figures = self.evaluate(step) if self._evaluation_is_due(step) else {}
        if not step.is_first_rank:
            return Report()
        warnings = self.watch.update(decision.assignments, [s.sources for s in decision.batch.sets])
        rows = list(assignment_rows(step.iteration, decision.batch, decision.assignments))
        return Report(figures | self.watch.figures, [(ASSIGNMENTS, rows)], list(warnings))

    def _evaluation_is_due(self, step: StepContext) -> bool:
        if self.sets.held_out is None:
            return False
        every = self.config.data.eval_interval
        return step.iteration == step.train_iters or (every is not None and step.iteration % every == 0)

    def evaluate(self, step: StepContext) -> Figures:
        """Loss on the held-out questions, each trace under its matched tag, with the matching's own figures."""
        loss = denominator = cost = gap = 0.0
        questions = 0
        limit = self.config.data.eval_questions or len(self.sets.held_out or ())
        for batch in self.sets.held_out_batches(limit, self.config.batches.global_batch_size):
            assignments = self.matching.optimal(step, batch)
            planned = self.plan(step, batch, assignments)
            loss += step.score(planned).weighted_nll()
            denominator += self.denominator(batch, assignments)
            questions += len(batch.sets)
            for assignment in assignments:
                if assignment.cost is not None and assignment.cost_NM is not None:
                    cost += assignment.cost
                    gap += assignment_gap(assignment.cost_NM)
        figures: Figures = {"eval_loss": loss / denominator}
        if self.config.matching.matching != "single":
            figures |= {"eval_matching_cost": cost / questions, "eval_matching_gap": gap / questions}
        return figures

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def pass_over(self, steps: int) -> None:
        for _ in range(steps):
            self.sets.queue.next_batch()

    def train_iters(self, iteration: int) -> int:
        """--train-iters, else as many steps as the epochs have; the batch size may have changed since the start."""
        return self.config.run.training.train_iters or iteration + self.sets.queue.remaining_batches()

    def train_iters_under(self, config: SSFTConfig, state: RunState) -> int:
        """The same of another configuration, from a checkpoint on."""
        if config.run.training.train_iters is not None:
            return config.run.training.train_iters
        assert isinstance(state, SSFTState)
        queue = build_queue(config, self.sets.train)
        queue.load_state_dict(state.queue)
        return state.iteration + queue.remaining_batches()

    @property
    def fingerprint(self) -> str:
        return self.sets.train.fingerprint

    def complete_state(self, state: RunState) -> RunState:
        """The place in the data, assignments that are reused, and the alarm's window, which the first rank keeps."""
        return SSFTState(
            **structs.asdict(state),
            queue=self.sets.queue.state_dict(),
            reused_assignments=self.matching.store.state_dict(),
            collapse_watch=self.watch.state_dict(),
        )

    def check_state(self, run: Path, state: WeightsState) -> None:
        if not isinstance(state, SSFTState):
            raise UserError(f"--load {run}: is no run of this program; start from its weights alone with --finetune")

    def load_state(self, state: RunState) -> None:
        assert isinstance(state, SSFTState)
        self.sets.queue.load_state_dict(state.queue)
        if not isinstance(state.reused_assignments, UnsetType):
            self.matching.store.load_state_dict(state.reused_assignments)
        if not isinstance(state.collapse_watch, UnsetType):
            self.watch.load_state_dict(state.collapse_watch)

    # -- words ---------------------------------------------------------------------------------------------------

    def introduction(self) -> str:
        return f"{len(self.sets.train)} questions, {int(self.sets.train.trace_counts.sum())} traces"

    def notes(self) -> Sequence[str]:
        held_out = self.sets.held_out
        notes = data_notes(self.config, TRAINING_DATA, self.sets.train)
        return notes + ([] if held_out is None else data_notes(self.config, HELD_OUT_DATA, held_out))

    def line(self, row: Mapping[str, object]) -> str:
        return step_line(row)


def truncated_share(batch: QuestionBatch) -> float:
    """Share of a batch's traces that lost their end to --seq-length."""
    return sum(s.truncated for s in batch.sets) / sum(s.num_traces for s in batch.sets)
