"""GRPO on every token of stored completions: the baseline that GFPO is compared with.

The loss is that of `formulas/token_policy.py`. Which tag starts a completion is data here, not a choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_ssft.config import GFPOConfig
from megatron_ssft.formats.metrics import GRPOMetrics
from megatron_ssft.objectives.formulas.token_policy import clipped_token_loss, group_advantages
from megatron_ssft.objectives.objective import Decision, Figures, StepContext
from megatron_ssft.objectives.policy.completion_scoring import count, joined
from megatron_ssft.objectives.policy.draws import nth_batch
from megatron_ssft.objectives.policy.objective import PolicyObjective
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import Microbatch, ModelInput
from megatron_ssft.tokenizers.vocabulary import Vocabulary

GRPO_FIGURES = ("policy_loss", "kl", "clipped", "completion_nll", "completion_tokens")


class GRPO(PolicyObjective):
    """Group-relative policy optimization over whole completions (--objective grpo)."""

    metrics = GRPOMetrics

    def __init__(self, config: GFPOConfig, vocabulary: Vocabulary, topology: Topology) -> None:
        super().__init__(config, vocabulary, topology)
        self.groups: list[list[int]] = [[] for _ in self.inputs.questions]
        """Completions of each question."""
        for number, completion in enumerate(self.inputs.completions):
            self.groups[completion.question].append(number)
        rewards = [np.array([self.inputs.completions[n].reward for n in group]) for group in self.groups]
        advantages = group_advantages(rewards, bool(config.policy.group_normalization))
        self.advantages = {n: a for group, of in zip(self.groups, advantages) for n, a in zip(group, of)}

    def decide(self, step: StepContext) -> Decision:
        """All completions of the step's questions."""
        per_step, seed = self.policy.questions_per_step, self.config.run.training.seed
        draws = nth_batch(len(self.inputs.questions), per_step, step.iteration, seed, "questions")
        questions = list(dict.fromkeys(draws))  # over the border of an epoch a question may come twice
        which = [number for q in questions for number in self.groups[q]]
        rewards = [self.inputs.completions[number].reward for number in which]

        def figures(sums: Mapping[str, float]) -> Figures:
            tokens = sums["completion_tokens"]
            before = sum(map(self.reference.nll_sum, which))
            return {
                "reward_stored": float(np.mean(rewards)),
                "kl": sums["kl"],
                "clip_fraction": sums["clipped"] / tokens,
                "completion_nll": sums["completion_nll"] / tokens,
                "completion_nll_shift": (sums["completion_nll"] - before) / tokens,
                "truncated_share": self.inputs.truncated_share(questions),
                **self.common_figures(0.0),
            }

        return Decision(terms=[self.token_term(step, which)], figures=figures, questions=len(questions))

    def token_term(self, step: StepContext, which: Sequence[int]) -> LossTerm:
        """The clipped loss on every token of the completions."""
        policy, completions = self.policy, self.scorer.plan(step, which)
        assert policy.clip_eps is not None and policy.clip_eps_high is not None
        clip_low, clip_high = policy.clip_eps, policy.clip_eps_high
        lengths = {number: len(self.inputs.completions[number].ids) for number in which}
        total = sum(lengths.values())

        def weight(number: int) -> float:
            return 1.0 / total if policy.token_normalization == "token" else 1.0 / (len(which) * lengths[number])

        def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
            numbers = completions.of(microbatch)
            columns = [
                [self.reference.nll(number) for number in numbers],
                [self.reference.reference_nll(number) for number in numbers],
                [np.full(lengths[number], self.advantages[number], dtype=np.float32) for number in numbers],
                [np.full(lengths[number], weight(number), dtype=np.float32) for number in numbers],
            ]
            nothing = np.zeros(0, dtype=np.float32)  # for a microbatch of PADs
            return model_input, tuple(joined([nothing, *column], len(model_input.targets)) for column in columns)

        def loss(nll: Tensor, old: Tensor, stays: Tensor, advantage: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            value, sums = clipped_token_loss(
                nll, old, stays, advantage, weights, clip_low=clip_low, clip_high=clip_high, kl=policy.kl_coef
            )
            return value, torch.cat([sums, nll.detach().double().sum()[None], count(nll)[None]])

        return LossTerm(completions.planned, prepare, loss, GRPO_FIGURES)
