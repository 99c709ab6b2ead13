"""Likelihoods of the scored tokens of a planned batch: one forward pass without gradients, read in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.parallel.collectives import sum_over_ranks
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import Microbatch, ModelInput, PlannedBatch, SequenceSpec


@dataclass(frozen=True)
class ScoredMicrobatch:
    """One microbatch after its forward pass."""

    microbatch: Microbatch
    model_input: ModelInput
    output: np.ndarray
    """float64 [n]: NLL of the scored tokens; with `top_k` [n, 1 + 2 k]: NLL, k log-probabilities, their k ids."""


class Scores:
    """The scores of a planned batch. Every rank holds those of its own microbatches; ranks without a loss hold none."""

    def __init__(self, planned: PlannedBatch, share: Sequence[ScoredMicrobatch], topology: Topology) -> None:
        """`share`: the microbatches of this rank."""
        self.planned = planned
        self.share = share
        self._topology = topology

    def nll_sums(self) -> np.ndarray:
        """float64 [S]: NLL of every sequence of the plan, in its order, summed over the scored tokens. Collective.

        The same on every rank, and independent of which rank scored a sequence: float32 NLLs are summed in float64,
        each sum stands at its own place in one vector, and the vectors are added in one all-reduce.
        """
        place = {spec: number for number, spec in enumerate(self.planned.plan.sequences)}
        sums = np.zeros(len(place))
        for scored in self.share:
            sequences = scored.microbatch.sequences
            totals = np.bincount(scored.model_input.owner, weights=scored.output, minlength=len(sequences))
            for spec, total in zip(sequences, totals):
                if not spec.is_pad:
                    sums[place[spec]] += total
        return sum_over_ranks(sums, self._topology)

    def nll_tokens(self, longest: int) -> np.ndarray:
        """float64 [S, T]: NLL of every scored token of every sequence of the plan, 0 behind its end. Collective.

        The same on every rank, as `nll_sums`. `longest`: T, at least the scored tokens of any sequence.
        """
        place = {spec: number for number, spec in enumerate(self.planned.plan.sequences)}
        tokens = np.zeros((len(place), longest))
        for spec, output in self.of_sequences():
            tokens[place[spec], : len(output)] += output
        return sum_over_ranks(tokens.reshape(-1), self._topology).reshape(tokens.shape)

    def weighted_nll(self) -> float:
        """Sum of loss weight x NLL over all scored tokens of all ranks. Collective."""
        total = sum(float((s.output * s.model_input.weights.astype(np.float64)).sum()) for s in self.share)
        return float(sum_over_ranks(np.array([total]), self._topology)[0])

    def of_sequences(self) -> list[tuple[SequenceSpec, np.ndarray]]:
        """(sequence, its rows of the output) for the sequences of this rank."""
        return [
            (spec, scored.output[scored.model_input.owner == place])
            for scored in self.share
            for place, spec in enumerate(scored.microbatch.sequences)
            if not spec.is_pad
        ]
