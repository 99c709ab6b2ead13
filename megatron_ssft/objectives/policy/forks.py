"""The tags at the end of prompts: how probable the model finds each, which is the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.objectives.objective import StepContext
from megatron_ssft.objectives.policy.inputs import fork_batch
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared, weighted_nll
from megatron_ssft.records import (
    NO_TAG,
    Assignment,
    ForkingTokens,
    Microbatch,
    ModelInput,
    PlannedBatch,
    TokenizedSet,
)

_QUESTIONS_AT_ONCE = 512
"""Scored in one pass, where it is about more than a step's."""


class Forks:
    """Scores and trains tags as completions of their prompts, with no tag between the two. Q questions, N tags."""

    def __init__(self, tags: ForkingTokens) -> None:
        self.tags = tags

    def plan(self, step: StepContext, questions: Sequence[TokenizedSet]) -> PlannedBatch:
        """The tags of the questions, to be scored or trained."""
        batch, none = fork_batch(questions, self.tags.ids), Assignment((0,) * self.tags.num_tags)
        return step.planner.plan_sequences(batch, [none] * len(questions), NO_TAG)

    def planned_logp(self, step: StepContext, planned: PlannedBatch) -> np.ndarray:
        """float64 [Q, N]: log-probability of each tag under the present weights, the same everywhere. Collective."""
        logp_QN = np.zeros((len(planned.batch.sets), self.tags.num_tags))
        for spec, nll_sum in zip(planned.plan.sequences, step.score(planned).nll_sums(), strict=True):
            logp_QN[spec.question, spec.trace] = -nll_sum
        return logp_QN

    def logp(self, step: StepContext, questions: Sequence[TokenizedSet]) -> np.ndarray:
        """`planned_logp` of any number of questions. Collective."""
        parts = [questions[i : i + _QUESTIONS_AT_ONCE] for i in range(0, len(questions), _QUESTIONS_AT_ONCE)]
        return np.concatenate([self.planned_logp(step, self.plan(step, part)) for part in parts])


def fork_term(planned: PlannedBatch, gradient_QN: np.ndarray) -> LossTerm:
    """The tags as completions of their prompts, each weighted by the derivative of the objective.

    The objective is a function of log p(tag), which is minus the tag's NLL: descending sum(gradient x NLL) ascends it.
    The weights are those of the present model, so the gradient is exact.
    """

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        of_sequence = [0.0 if s.is_pad else gradient_QN[s.question, s.trace] for s in microbatch.sequences]
        return model_input, (np.asarray(of_sequence, dtype=np.float32)[model_input.owner],)

    return LossTerm(planned, prepare, weighted_nll)
