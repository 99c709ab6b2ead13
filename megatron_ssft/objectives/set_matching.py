"""The matching of a step: which costs are evaluated, the assignment they give, and what approximations lose.

The cost of trace j under tag i is the mean NLL of its first T_r tokens; the assignment minimises the sum over a
question's traces (equations 3-4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ssft.config import SSFTConfig
from megatron_ssft.matching.approximation import AssignmentStore, assignment_regret, is_certain, known_cost
from megatron_ssft.matching.assignment import Matcher, assignment_gap
from megatron_ssft.objectives.objective import StepContext
from megatron_ssft.records import Assignment, ForkingTokens, PlannedBatch, QuestionBatch
from megatron_ssft.seeded import text_digest, whole_number

Decide = Callable[[StepContext, QuestionBatch, "Matched"], "Sequence[tuple[int, ...] | None]"]


@dataclass
class Matched:
    """The assignments of a batch and what it took to find them."""

    assignments: list[Assignment]
    seconds: float = 0.0
    """All of the matching, without what is evaluated for the log alone."""
    solving_seconds: float = 0.0
    """Of these, for solving and broadcasting."""
    flops: float = 0.0
    """Model FLOPs of the forward passes behind `seconds`."""
    figures: dict[str, Any] = field(default_factory=dict)
    """For the log: what an approximation did and lost."""


class SetMatching:
    """Matches the questions of a batch, each on its own; the same on every rank."""

    def __init__(self, config: SSFTConfig, tags: ForkingTokens) -> None:
        self.config = config.matching
        self.tags = tags
        self.matcher = Matcher(config.matching.matching, tags.num_tags, config.run.training.seed)
        self.store = AssignmentStore(config.matching.matching_interval)

    def match(self, step: StepContext, batch: QuestionBatch) -> Matched:
        """The assignments of one training step. Collective."""
        begin = time.perf_counter()
        with step.part("matching"):
            matched = self._approximate(step, batch) if self.config.approximates else self._exact(step, batch)
        matched.seconds = time.perf_counter() - begin
        if self.config.approximates and self._is_sampled(step.iteration):
            with step.part("evaluation"):
                self._measure_regret(step, batch, matched)
        return matched

    def _is_sampled(self, iteration: int) -> bool:
        """One step in every --regret-interval, at a place that does not keep time with epochs and their visits."""
        every = self.config.regret_interval
        if every == 0:
            return False
        digest = text_digest(self.matcher.seed, iteration // every, algorithm="blake2b", size=8)
        return iteration % every == whole_number(digest, bits=64) % every

    def optimal(self, step: StepContext, batch: QuestionBatch) -> list[Assignment]:
        """Match by the exact costs, where the mode asks for costs at all: what an evaluation uses. Collective."""
        costs: Sequence[np.ndarray | None] = [None] * len(batch.sets)
        if self.config.matching != "single":
            costs = self.costs(step, batch, Matched([]))
        return self._solve(step, batch, costs, Matched([]))

    def costs(
        self, step: StepContext, batch: QuestionBatch, matched: Matched, matching_tokens: int | None = None
    ) -> list[np.ndarray]:
        """Q matrices float64 [N, M] of matching costs in nats, under the current weights, without a gradient.

        `matching_tokens`: T_r, by default --matching-tokens. What it takes is counted in `matched`.
        """
        planned = step.planner.plan_costs(batch, self.tags, matching_tokens or self.config.matching_tokens)
        matched.flops += step.accountant.forward(planned.plan)
        low_precision = self.config.matching_precision == "bf16"
        return cost_matrices(planned, step.score(planned, low_precision=low_precision).nll_sums())

    # -- exact -------------------------------------------------------------------------------------------------------

    def _exact(self, step: StepContext, batch: QuestionBatch) -> Matched:
        matched = Matched([])
        every = self.config.log_matching_interval
        for_log = self.config.matching in ("random", "fixed") and every > 0 and step.iteration % every == 0
        costs: Sequence[np.ndarray | None] = [None] * len(batch.sets)
        if self.matcher.needs_costs or for_log:
            costs = self.costs(step, batch, matched)
        matched.assignments = self._solve(step, batch, costs, matched)
        return matched

    def _solve(
        self, step: StepContext, batch: QuestionBatch, costs: Sequence[np.ndarray | None], matched: Matched
    ) -> list[Assignment]:
        """Solved once, on the first rank, so that every rank trains by the same assignment."""
        begin = time.perf_counter()
        tags = step.once(lambda: [a.tags for a in self.matcher.assign(batch, costs)])
        matched.solving_seconds += time.perf_counter() - begin
        return [Assignment(tuple(question_tags), cost) for question_tags, cost in zip(tags, costs)]

    # -- approximations ----------------------------------------------------------------------------------------------

    def _approximate(self, step: StepContext, batch: QuestionBatch) -> Matched:
        """Assignments of earlier visits, then certain ones by the first tokens, then the rest exactly."""
        matched = Matched([])
        tags = [self.store.reusable(v.epoch, s) for v, s in zip(batch.visits, batch.sets)]
        reused = sum(t is not None for t in tags)
        certain = 0
        if self.config.matching_first_tokens is not None:
            self._settle(step, batch, tags, self._first_tokens, matched)
            certain = sum(t is not None for t in tags) - reused
        self._settle(step, batch, tags, self._all_tokens, matched)
        for visit, tokenized, question_tags in zip(batch.visits, batch.sets, tags):
            assert question_tags is not None, "every question is settled by now"
            self.store.remember(visit.epoch, tokenized, question_tags)
            matched.assignments.append(Assignment(question_tags))
        matched.figures = {"matching_reused": reused, "matching_certain": certain}
        return matched

    def _settle(
        self,
        step: StepContext,
        batch: QuestionBatch,
        tags: list[tuple[int, ...] | None],
        decide: Decide,
        matched: Matched,
    ) -> None:
        """Let `decide` find tags for the questions that have none yet, in place."""
        open_questions = [q for q, question_tags in enumerate(tags) if question_tags is None]
        if open_questions:
            rest = QuestionBatch(
                tuple(batch.visits[q] for q in open_questions), tuple(batch.sets[q] for q in open_questions)
            )
            for q, question_tags in zip(open_questions, decide(step, rest, matched)):
                tags[q] = question_tags

    def _all_tokens(
        self, step: StepContext, batch: QuestionBatch, matched: Matched
    ) -> Sequence[tuple[int, ...] | None]:
        return [a.tags for a in self._solve(step, batch, self.costs(step, batch, matched), matched)]

    def _first_tokens(
        self, step: StepContext, batch: QuestionBatch, matched: Matched
    ) -> Sequence[tuple[int, ...] | None]:
        """The assignment by the first tokens where the rest could hardly change it, else None."""
        first, certainty = self.config.matching_first_tokens, self.config.matching_certainty
        assert first is not None and certainty is not None
        costs = self.costs(step, batch, matched, first)

        def decide() -> list[list[int] | None]:
            every = self.config.matching_tokens
            decided: list[list[int] | None] = []
            for visit, tokenized, cost in zip(batch.visits, batch.sets, costs):
                lengths = [len(c) for c in tokenized.completion_ids]
                if is_certain(cost, lengths, first, every, certainty):
                    lower_cost = known_cost(cost, lengths, first, every)
                    (assignment,) = self.matcher.assign(QuestionBatch((visit,), (tokenized,)), [lower_cost])
                    decided.append(list(assignment.tags))
                else:
                    decided.append(None)
            return decided

        begin = time.perf_counter()
        decided = step.once(decide)
        matched.solving_seconds += time.perf_counter() - begin
        return [None if tags is None else tuple(tags) for tags in decided]

    def _measure_regret(self, step: StepContext, batch: QuestionBatch, matched: Matched) -> None:
        """Evaluate the exact costs too: what the approximation loses in nats per question, and saves in seconds."""
        begin = time.perf_counter()
        aside = Matched([])
        costs = self.costs(step, batch, aside)
        best = self._solve(step, batch, costs, aside)
        matched.figures |= {
            "matching_regret": float(
                np.mean([assignment_regret(c, a.tags) for c, a in zip(costs, matched.assignments)])
            ),
            "exact_matching_seconds": time.perf_counter() - begin,
            "matching_same": sum(a.tags == b.tags for a, b in zip(matched.assignments, best)),
        }
        matched.assignments = [Assignment(a.tags, c) for a, c in zip(matched.assignments, costs)]


def cost_matrices(planned: PlannedBatch, nll_sums: np.ndarray) -> list[np.ndarray]:
    """Q matrices float64 [N, M]: mean NLL of each trace's first T_r tokens under each tag (equations 3-4).

    Args:
        planned: the pairs (tag, trace) as `Planner.plan_costs` gives them.
        nll_sums: float64 [S], of each sequence of its plan.
    """
    sets = planned.batch.sets
    costs = [np.full((planned.tags.num_tags, s.num_traces), np.nan) for s in sets]
    for spec, nll_sum in zip(planned.plan.sequences, nll_sums, strict=True):
        if spec.num_scored:
            costs[spec.question][spec.tag, spec.trace] = nll_sum / spec.num_scored
    assert planned.scored_as is not None, "the plan of a cost pass says which trace stands for which"
    return [cost[:, list(places)] for cost, places in zip(costs, planned.scored_as)]


def matching_figures(assignments: list[Assignment]) -> dict[str, float | None]:
    """Cost and gap in nats per question, totals over its traces, where costs were evaluated."""
    costs = [a.cost for a in assignments if a.cost is not None]
    gaps = [assignment_gap(a.cost_NM) for a in assignments if a.cost_NM is not None]
    return {
        "matching_cost": float(np.mean(costs)) if costs else None,
        "matching_gap": float(np.mean(gaps)) if gaps else None,
    }
