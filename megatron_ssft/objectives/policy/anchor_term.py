"""The anchor as a loss term: KL to the reference on stored completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_ssft.objectives.formulas.anchor import top_k_kl
from megatron_ssft.objectives.objective import StepContext
from megatron_ssft.objectives.policy.completion_scoring import CompletionScorer, count, joined
from megatron_ssft.objectives.policy.reference import Reference
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared
from megatron_ssft.records import Microbatch, ModelInput

ANCHOR_FIGURES = ("anchor_kl", "completion_nll", "completion_tokens")


def anchor_term(
    step: StepContext, scorer: CompletionScorer, reference: Reference, which: Sequence[int], coef: float
) -> LossTerm:
    """KL(reference || model) on stored completions, `coef` times its mean over their tokens."""
    completions = scorer.plan(step, which)
    tokens = sum(len(scorer.inputs.completions[number].ids) for number in which)

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        tops = [reference.no_top, *map(reference.top, completions.of(microbatch))]  # the first for a microbatch of PADs
        ids, logp = (joined(parts, len(model_input.targets)) for parts in zip(*tops))
        targets = np.concatenate([model_input.targets[:, None], ids], axis=1)
        return replace(model_input, targets=targets), (logp,)

    def loss(nll: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.full((len(nll),), coef / tokens, dtype=torch.float32, device=nll.device)
        value, kl = top_k_kl(nll[:, 1:], logp, weights)
        return value, torch.stack([kl.double().sum(), nll[:, 0].detach().double().sum(), count(nll)])

    return LossTerm(completions.planned, prepare, loss, ANCHOR_FIGURES)
