"""The matching of a step: which costs are evaluated, the assignment they give, and what approximations lose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_ssft.config import Config
from megatron_ssft.matching.approximation import AssignmentStore, assignment_regret, is_certain, known_cost
from megatron_ssft.matching.assignment import Matcher, assignment_gap
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import Assignment, QuestionBatch
from megatron_ssft.scheduling.accounting import FlopAccountant
from megatron_ssft.seeded import text_digest, whole_number
from megatron_ssft.training.planning import Planner

Decide = Callable[[QuestionBatch, "Matched"], "list[tuple[int, ...] | None]"]


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
    figures: dict[str, object] = field(default_factory=dict)
    """For the log: what an approximation did and lost."""


class SetMatching:
    """Matches the questions of a batch, each on its own; the same on every rank."""

    def __init__(self, config: Config, topology: Topology, engine: Engine, planner: Planner, num_tags: int) -> None:
        self.config = config.matching
        self.topology = topology
        self.engine = engine
        self.planner = planner
        self.accountant = FlopAccountant(planner.flops)
        self.matcher = Matcher(config.matching.matching, num_tags, config.training.seed)
        self.store = AssignmentStore(config.matching.matching_interval)

    def match(self, batch: QuestionBatch, iteration: int) -> Matched:
        """The assignments of one training step; `iteration` counts the steps done."""
        begin = time.perf_counter()
        matched = self._approximate(batch) if self.config.approximates else self._exact(batch, iteration)
        matched.seconds = time.perf_counter() - begin
        if self.config.approximates and self._is_sampled(iteration):
            self._measure_regret(batch, matched)
        return matched

    def _is_sampled(self, iteration: int) -> bool:
        """One step in every --regret-interval, at a place that does not keep time with epochs and their visits."""
        every = self.config.regret_interval
        if every == 0:
            return False
        digest = text_digest(self.matcher.seed, iteration // every, algorithm="blake2b", size=8)
        return iteration % every == whole_number(digest, bits=64) % every

    def optimal(self, batch: QuestionBatch) -> list[Assignment]:
        """By the exact costs where the mode asks for costs at all: what an evaluation uses."""
        costs = None if self.config.matching == "single" else self._costs(batch, Matched([]))
        return self._solve(batch, costs or [None] * len(batch.sets), Matched([]))

    # -- exact -------------------------------------------------------------------------------------------------------

    def _exact(self, batch: QuestionBatch, iteration: int) -> Matched:
        matched = Matched([])
        every = self.config.log_matching_interval
        for_log = self.config.matching in ("random", "fixed") and every > 0 and iteration % every == 0
        wanted = self.matcher.needs_costs or for_log
        costs = self._costs(batch, matched) if wanted else [None] * len(batch.sets)
        matched.assignments = self._solve(batch, costs, matched)
        return matched

    def _costs(self, batch: QuestionBatch, matched: Matched, matching_tokens: int | None = None) -> list[np.ndarray]:
        """Q matrices float64 [N, M] of matching costs in nats, under the current weights, without a gradient."""
        tokens = matching_tokens or self.config.matching_tokens
        plan = self.planner.costs(batch, tokens)
        matched.flops += self.accountant.forward(plan)
        return self.engine.costs(batch, plan, tokens)

    def _solve(self, batch: QuestionBatch, costs: list[np.ndarray] | list[None], matched: Matched) -> list[Assignment]:
        """Solved once, on the first rank, so that every rank trains by the same assignment."""
        begin = time.perf_counter()
        solved = on_first_rank(lambda: [a.tags for a in self.matcher.assign(batch, costs)], self.topology)
        matched.solving_seconds += time.perf_counter() - begin
        return [Assignment(tuple(tags), cost) for tags, cost in zip(solved, costs)]

    # -- approximations ----------------------------------------------------------------------------------------------

    def _approximate(self, batch: QuestionBatch) -> Matched:
        """Assignments of earlier visits, then certain ones by the first tokens, then the rest exactly."""
        matched = Matched([])
        tags = [self.store.reusable(v.epoch, s) for v, s in zip(batch.visits, batch.sets)]
        reused = sum(t is not None for t in tags)
        certain = 0
        if self.config.matching_first_tokens is not None:
            self._settle(batch, tags, self._first_tokens, matched)
            certain = sum(t is not None for t in tags) - reused
        self._settle(batch, tags, self._all_tokens, matched)
        for visit, tokenized, chosen in zip(batch.visits, batch.sets, tags):
            self.store.remember(visit.epoch, tokenized, chosen)
        matched.assignments = [Assignment(chosen) for chosen in tags]
        matched.figures = {"matching_reused": reused, "matching_certain": certain}
        return matched

    def _settle(
        self, batch: QuestionBatch, tags: list[tuple[int, ...] | None], decide: Decide, matched: Matched
    ) -> None:
        """Let `decide` find tags for the questions that have none yet, in place."""
        open_questions = [q for q, chosen in enumerate(tags) if chosen is None]
        if open_questions:
            rest = QuestionBatch(
                tuple(batch.visits[q] for q in open_questions), tuple(batch.sets[q] for q in open_questions)
            )
            for q, chosen in zip(open_questions, decide(rest, matched)):
                tags[q] = chosen

    def _all_tokens(self, batch: QuestionBatch, matched: Matched) -> list[tuple[int, ...]]:
        return [a.tags for a in self._solve(batch, self._costs(batch, matched), matched)]

    def _first_tokens(self, batch: QuestionBatch, matched: Matched) -> list[tuple[int, ...] | None]:
        """The assignment by the first tokens where the rest could hardly change it, else None."""
        first, certainty = self.config.matching_first_tokens, self.config.matching_certainty
        costs = self._costs(batch, matched, first)

        def decide() -> list[list[int] | None]:
            every = self.config.matching_tokens
            decided = []
            for visit, tokenized, cost in zip(batch.visits, batch.sets, costs):
                lengths = [len(c) for c in tokenized.completion_ids]
                if is_certain(cost, lengths, first, every, certainty):
                    known = known_cost(cost, lengths, first, every)
                    (assignment,) = self.matcher.assign(QuestionBatch((visit,), (tokenized,)), [known])
                    decided.append(list(assignment.tags))
                else:
                    decided.append(None)
            return decided

        begin = time.perf_counter()
        decided = on_first_rank(decide, self.topology)
        matched.solving_seconds += time.perf_counter() - begin
        return [None if tags is None else tuple(tags) for tags in decided]

    def _measure_regret(self, batch: QuestionBatch, matched: Matched) -> None:
        """Evaluate the exact costs too: what the approximation loses in nats a question, and saves in seconds."""
        begin = time.perf_counter()
        aside = Matched([])
        costs = self._costs(batch, aside)
        best = self._solve(batch, costs, aside)
        matched.figures |= {
            "matching_regret": float(
                np.mean([assignment_regret(c, a.tags) for c, a in zip(costs, matched.assignments)])
            ),
            "exact_matching_seconds": time.perf_counter() - begin,
            "matching_same": sum(a.tags == b.tags for a, b in zip(matched.assignments, best)),
        }
        matched.assignments = [Assignment(a.tags, c) for a, c in zip(matched.assignments, costs)]


def matching_figures(assignments: list[Assignment]) -> dict[str, float | None]:
    """Cost and gap in nats a question, totals over its traces, where costs were evaluated."""
    measured = [a for a in assignments if a.cost_NM is not None]
    return {
        "matching_cost": float(np.mean([a.cost for a in measured])) if measured else None,
        "matching_gap": float(np.mean([assignment_gap(a.cost_NM) for a in measured])) if measured else None,
    }
