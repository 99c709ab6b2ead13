"""The tags at the end of prompts: how probable the model finds each, which is the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.objectives.formulas.outside_mass import TagTree
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
        self.tree = TagTree(tags.ids)

    def plan(self, step: StepContext, questions: Sequence[TokenizedSet]) -> PlannedBatch:
        """The tags of the questions, to be scored or trained."""
        batch, none = fork_batch(questions, self.tags.ids), Assignment((0,) * self.tags.num_tags)
        return step.planner.plan_sequences(batch, [none] * len(questions), NO_TAG)

    def planned_logp(self, step: StepContext, planned: PlannedBatch) -> np.ndarray:
        """float64 [Q, N, T]: log-probability of each token of each tag under the present weights. Collective.

        The same everywhere; 0 behind the end of a tag that is shorter than others.
        """
        logp_QNT = np.zeros((len(planned.batch.sets), self.tags.num_tags, self.tree.length))
        nll_ST = step.score(planned).nll_tokens(self.tree.length)
        for spec, nll_T in zip(planned.plan.sequences, nll_ST, strict=True):
            logp_QNT[spec.question, spec.trace] = -nll_T
        return logp_QNT

    def logp(self, step: StepContext, questions: Sequence[TokenizedSet]) -> np.ndarray:
        """float64 [Q, N]: log-probability of each whole tag, of any number of questions. Collective."""
        parts = [questions[i : i + _QUESTIONS_AT_ONCE] for i in range(0, len(questions), _QUESTIONS_AT_ONCE)]
        return np.concatenate([self.planned_logp(step, self.plan(step, part)).sum(axis=2) for part in parts])


def fork_term(planned: PlannedBatch, gradient_QNT: np.ndarray) -> LossTerm:
    """The tags as completions of their prompts, each token weighted by the derivative of the objective.

    The objective is a function of log p(token), which is minus the token's NLL: descending sum(gradient x NLL) ascends
    it. The weights are those of the present model, so the gradient is exact.
    """

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        weights = np.zeros(len(model_input.owner), dtype=np.float32)
        for number, spec in enumerate(microbatch.sequences):
            places = np.flatnonzero(model_input.owner == number)
            if not spec.is_pad:
                weights[places] = gradient_QNT[spec.question, spec.trace, : len(places)]
        return model_input, (weights,)

    return LossTerm(planned, prepare, weighted_nll)
