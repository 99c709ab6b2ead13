"""The loss terms of a step: tags weighted by their gradient, the anchor, GRPO's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_ssft.config import PolicyConfig
from megatron_ssft.objectives.anchor import top_k_kl
from megatron_ssft.objectives.token_policy import clipped_token_loss
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared, weighted_nll
from megatron_ssft.records import (
    NO_TAG,
    Microbatch,
    MicrobatchPlan,
    ModelInput,
    QuestionBatch,
)
from megatron_ssft.training.policy.completion_scoring import CompletionScorer
from megatron_ssft.training.policy.reference import Reference

ANCHOR_FIGURES = ("anchor_kl", "completion_nll", "completion_tokens")
GRPO_FIGURES = ("policy_loss", "kl", "clipped", "completion_nll", "completion_tokens")


def fork_term(batch: QuestionBatch, plan: MicrobatchPlan, gradient_QN: np.ndarray) -> LossTerm:
    """The tags as completions of their prompts, each weighted by the derivative of the objective.

    The objective is a function of log p(tag), which is minus the tag's NLL: descending sum(gradient x NLL) ascends it.
    The weights are those of the present model, so the gradient is exact.
    """

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        of_sequence = [0.0 if s.is_pad else gradient_QN[s.question, s.trace] for s in microbatch.sequences]
        return model_input, (np.asarray(of_sequence, dtype=np.float32)[model_input.owner],)

    return LossTerm(batch, plan, NO_TAG, prepare, weighted_nll)


def anchor_term(scorer: CompletionScorer, reference: Reference, which: Sequence[int], coef: float) -> LossTerm:
    """KL(reference || model) on stored completions, `coef` times its mean over their tokens."""
    batch, assignments, numbers = scorer.inputs.completion_batch(which)
    tokens = sum(len(scorer.inputs.completions[number].ids) for number in which)

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        mine = _numbers(microbatch, numbers)
        tops = [reference.no_top, *map(reference.top, mine)]  # the first for a microbatch of PADs
        ids, logp = (_joined(parts, len(model_input.targets)) for parts in zip(*tops))
        targets = np.concatenate([model_input.targets[:, None], ids], axis=1)
        return replace(model_input, targets=targets), (logp,)

    def loss(nll: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.full((len(nll),), coef / tokens, dtype=torch.float32, device=nll.device)
        value, kl = top_k_kl(nll[:, 1:], logp, weights)
        return value, torch.stack([kl.double().sum(), nll[:, 0].detach().double().sum(), _count(nll)])

    return LossTerm(batch, scorer.plan(batch, assignments), scorer.tags, prepare, loss, ANCHOR_FIGURES)


def grpo_term(
    scorer: CompletionScorer,
    reference: Reference,
    which: Sequence[int],
    advantages: dict[int, float],
    policy: PolicyConfig,
) -> LossTerm:
    """GRPO on every token of stored completions; `advantages` by completion."""
    batch, assignments, numbers = scorer.inputs.completion_batch(which)
    lengths = {number: len(scorer.inputs.completions[number].ids) for number in which}
    total = sum(lengths.values())

    def weight(number: int) -> float:
        return 1.0 / total if policy.token_normalization == "token" else 1.0 / (len(which) * lengths[number])

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        mine = _numbers(microbatch, numbers)
        columns = [
            [reference.nll(number) for number in mine],
            [reference.reference_nll(number) for number in mine],
            [np.full(lengths[number], advantages[number], dtype=np.float32) for number in mine],
            [np.full(lengths[number], weight(number), dtype=np.float32) for number in mine],
        ]
        nothing = np.zeros(0, dtype=np.float32)  # for a microbatch of PADs
        return model_input, tuple(_joined([nothing, *column], len(model_input.targets)) for column in columns)

    def loss(nll: Tensor, old: Tensor, stays: Tensor, advantage: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        value, figures = clipped_token_loss(
            nll, old, stays, advantage, weights,
            clip_low=policy.clip_eps, clip_high=policy.clip_eps_high, kl=policy.kl_coef,
        )  # fmt: skip
        return value, torch.cat([figures, nll.detach().double().sum()[None], _count(nll)[None]])

    return LossTerm(batch, scorer.plan(batch, assignments), scorer.tags, prepare, loss, GRPO_FIGURES)


def _numbers(microbatch: Microbatch, numbers: list[list[int]]) -> list[int]:
    """Which completions a microbatch holds."""
    return [numbers[s.question][s.trace] for s in microbatch.sequences if not s.is_pad]


def _joined(parts: Sequence[np.ndarray], places: int) -> np.ndarray:
    """Arrays of a microbatch's sequences, one after the other, as their scored places stand."""
    joined = np.concatenate(parts)
    assert len(joined) == places, "stored answers and completions differ"
    return joined


def _count(nll: Tensor) -> Tensor:
    return torch.full((), float(len(nll)), dtype=torch.float64, device=nll.device)
