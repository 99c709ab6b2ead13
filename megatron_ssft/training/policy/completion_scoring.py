"""How probable the model finds stored completions, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.parallel.engine import Engine
from megatron_ssft.records import NO_TAG, Assignment, ForkingTokens, MicrobatchPlan, QuestionBatch
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.training.policy.inputs import PolicyInputs

_CHUNK = 256
"""Completions that are scored at a time, to bound what is held in memory."""


@dataclass
class Answers:
    """What one rank has measured: arrays by completion."""

    nll: dict[int, np.ndarray]
    """float32 [L]"""
    top: dict[int, tuple[np.ndarray, np.ndarray]]
    """int32 and float32 [L, k]: ids and log-probabilities of the most probable tokens."""


class CompletionScorer:
    """Scores the completions of a run by their numbers."""

    def __init__(self, engine: Engine, planner: Planner, inputs: PolicyInputs) -> None:
        """`planner` is one for sequences with `tags` between prompt and completion."""
        self.engine, self.planner, self.inputs = engine, planner, inputs

    @property
    def tags(self) -> ForkingTokens:
        """What stands between prompt and completion."""
        return self.planner.tags

    def plan(self, batch: QuestionBatch, assignments: Sequence[Assignment]) -> MicrobatchPlan:
        """Of a batch of `PolicyInputs.completion_batch`."""
        return self.planner.train(batch, assignments)

    def measure(self, top_k: int | None) -> Answers:
        """Every token of every completion. Collective; each rank gets its own share."""
        answers = Answers({}, {})
        for first in range(0, len(self.inputs.completions), _CHUNK):
            which = range(first, min(first + _CHUNK, len(self.inputs.completions)))
            batch, assignments, numbers = self.inputs.completion_batch(which)
            for spec, output in self.engine.token_outputs(batch, self.plan(batch, assignments), self.tags, top_k):
                number = numbers[spec.question][spec.trace]
                if top_k is None:
                    answers.nll[number] = output.astype(np.float32)
                    continue
                answers.nll[number] = output[:, 0].astype(np.float32)
                logp, ids = np.split(output[:, 1:], 2, axis=1)
                answers.top[number] = ids.astype(np.int32), logp.astype(np.float32)
        return answers

    def sums(self, which: Sequence[int]) -> np.ndarray:
        """float64 [S]: NLL of each completion, the same on every rank. Collective."""
        batch, assignments, numbers = self.inputs.completion_batch(which)
        found = self.engine.sequence_nll(batch, self.plan(batch, assignments), self.tags)
        by_number = dict(zip((n for group in numbers for n in group), np.concatenate(found).tolist()))
        return np.array([by_number[number] for number in which])


def planner_for(engine: Engine, tags: ForkingTokens | None, num_ranks: int) -> Planner:
    """A planner for sequences with `tags` between prompt and completion; None: nothing stands there."""
    return Planner(engine.config, tags or NO_TAG, engine.vocab_size, num_ranks)
