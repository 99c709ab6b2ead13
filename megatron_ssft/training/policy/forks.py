"""The tags at the end of prompts: how probable the model finds each, which is the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.parallel.engine import Engine
from megatron_ssft.records import NO_TAG, Assignment, MicrobatchPlan, QuestionBatch, TokenizedSet
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.training.policy.inputs import fork_batch

_QUESTIONS_AT_ONCE = 512
"""Scored in one pass, where it is about more than a step's."""


class Forks:
    """Scores tags as completions of their prompts. Q questions, N tags."""

    def __init__(self, engine: Engine, planner: Planner) -> None:
        """`planner` plans sequences without a tag between prompt and completion: the tags are the completions."""
        self.engine, self.planner = engine, planner

    def plan(self, questions: Sequence[TokenizedSet]) -> tuple[QuestionBatch, MicrobatchPlan]:
        """The tags of the questions, to be scored or trained."""
        tags = self.engine.tags
        batch, none = fork_batch(questions, tags.ids), Assignment((0,) * tags.num_tags)
        return batch, self.planner.train(batch, [none] * len(questions))

    def planned_logp(self, batch: QuestionBatch, plan: MicrobatchPlan) -> np.ndarray:
        """float64 [Q, N]: log-probability of each tag under the present weights, the same everywhere. Collective."""
        return -np.stack(self.engine.sequence_nll(batch, plan, NO_TAG))

    def logp(self, questions: Sequence[TokenizedSet]) -> np.ndarray:
        """The same for any number of questions. Collective."""
        parts = [questions[i : i + _QUESTIONS_AT_ONCE] for i in range(0, len(questions), _QUESTIONS_AT_ONCE)]
        return np.concatenate([self.planned_logp(*self.plan(part)) for part in parts])
