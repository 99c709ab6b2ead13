"""Stored completions as batches, and how probable the model finds them, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ssft.objectives.objective import StepContext
from megatron_ssft.objectives.policy.inputs import PolicyInputs
from megatron_ssft.records import NO_TAG, ForkingTokens, Microbatch, PlannedBatch

_CHUNK = 256
"""Completions that are scored at a time, to bound what is held in memory."""


@dataclass
class Answers:
    """What one rank has measured: arrays by completion."""

    nll: dict[int, np.ndarray]
    """float32 [L]"""
    top: dict[int, tuple[np.ndarray, np.ndarray]]
    """int32 and float32 [L, k]: ids and log-probabilities of the most probable tokens."""


@dataclass(frozen=True)
class PlannedCompletions:
    """Completions as planned sequences."""

    planned: PlannedBatch
    numbers: list[list[int]]
    """Which completion each trace of each question is."""

    def of(self, microbatch: Microbatch) -> list[int]:
        """Which completions a microbatch holds, in its order."""
        return [self.numbers[s.question][s.trace] for s in microbatch.sequences if not s.is_pad]


class CompletionScorer:
    """Plans and scores the completions of a run by their numbers."""

    def __init__(self, inputs: PolicyInputs, tags: ForkingTokens) -> None:
        """`tags`: those of the model; whether they stand before the completions is known to `inputs`."""
        self.inputs = inputs
        self.tags = tags if inputs.tagged else NO_TAG

    def plan(self, step: StepContext, which: Sequence[int]) -> PlannedCompletions:
        """The completions, to be scored or trained."""
        batch, assignments, numbers = self.inputs.completion_batch(which)
        return PlannedCompletions(step.planner.plan_sequences(batch, assignments, self.tags), numbers)

    def measure(self, step: StepContext, top_k: int | None) -> Answers:
        """Every token of every completion. Collective; each rank gets its own share."""
        answers = Answers({}, {})
        for first in range(0, len(self.inputs.completions), _CHUNK):
            completions = self.plan(step, range(first, min(first + _CHUNK, len(self.inputs.completions))))
            for spec, output in step.score(completions.planned, top_k=top_k).of_sequences():
                number = completions.numbers[spec.question][spec.trace]
                if top_k is None:
                    answers.nll[number] = output.astype(np.float32)
                    continue
                answers.nll[number] = output[:, 0].astype(np.float32)
                logp, ids = np.split(output[:, 1:], 2, axis=1)
                answers.top[number] = ids.astype(np.int32), logp.astype(np.float32)
        return answers

    def sums(self, step: StepContext, which: Sequence[int]) -> np.ndarray:
        """float64 [S]: NLL of each completion, the same on every rank. Collective."""
        completions = self.plan(step, which)
        nll_sums = step.score(completions.planned).nll_sums()
        sequences = completions.planned.plan.sequences
        by_number = {completions.numbers[s.question][s.trace]: nll for s, nll in zip(sequences, nll_sums, strict=True)}
        return np.array([by_number[number] for number in which])


def joined(parts: Sequence[np.ndarray], places: int) -> np.ndarray:
    """Arrays of a microbatch's sequences, one after the other, as their scored places stand."""
    whole = np.concatenate(parts)
    assert len(whole) == places, "stored answers and completions differ"
    return whole


def count(nll: Tensor) -> Tensor:
    """float64 scalar: how many tokens there are."""
    return torch.full((), float(len(nll)), dtype=torch.float64, device=nll.device)
