"""NaN and infinity in weights, optimizer state and losses: found before they are trained on or published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ssft.errors import shared_error
from megatron_ssft.parallel.loss_terms import LossTerm
from megatron_ssft.parallel.model.gpt import SetGPTModel
from megatron_ssft.records import Microbatch

LOWER_LR = "go on from the last checkpoint with a lower --lr"
"""What to do about numbers that have left the finite; how such a message ends."""
_NAMED_AT_MOST = 8


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no floating-point tensor holds NaN or infinity: a pass over memory, one wait for the device."""
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return True
    # Both survive any sum, and a sum takes a tenth of the time of looking at each number.
    sums = torch.stack([tensor.sum().float() for tensor in floats])
    if bool(sums.isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in floats)  # very large numbers may add up to infinity


def find_damaged_weight(chunks: list[SetGPTModel]) -> str | None:
    """Name of this rank's first parameter that holds NaN or infinity, if any."""
    parameters = [item for chunk in chunks for item in chunk.named_parameters()]
    if all_finite(parameter for _, parameter in parameters):
        return None
    return next(name for name, parameter in parameters if not all_finite([parameter]))


def find_damaged_state(optimizer: MegatronOptimizer) -> str | None:
    """What this rank's optimizer state holds NaN or infinity in, e.g. `exp_avg_sq`; None if nothing."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        states = [] if inner is None else list(inner.state.values())
        named = [(name, value) for state in states for name, value in state.items() if isinstance(value, Tensor)]
        masters = [("the float32 weights", p) for group in getattr(inner, "param_groups", []) for p in group["params"]]
        if not all_finite(value for _, value in named + masters):
            return next(name for name, value in named + masters if not all_finite([value]))
    return None


def microbatches_of(terms: Sequence[LossTerm]) -> list[tuple[int, Microbatch]]:
    """(number of the term, microbatch) of every data-parallel rank, in one order on all ranks."""
    return [(i, mb) for i, term in enumerate(terms) for rank in term.planned.plan.ranks for mb in rank]


def refuse_bad_loss(loss: float, is_bad: Sequence[float], terms: Sequence[LossTerm]) -> None:
    """Raise UserError, on all ranks alike, for a loss that is not finite; it names who was in the microbatches.

    Args:
        is_bad: above 0 for a microbatch of `microbatches_of(terms)` whose own loss is not finite.
    """
    if math.isfinite(loss):
        return
    microbatches = microbatches_of(terms)
    culprits = [mb for mb, bad in zip(microbatches, is_bad, strict=True) if bad] or microbatches
    questions = _questions_of(terms, culprits)
    if len(questions) == 1:
        raise shared_error(f"{questions[0]}: the loss of this question is {loss}; correct the row, or {LOWER_LR}")
    raise shared_error(
        f"the loss of the step is {loss}, from {len(culprits)} of {len(microbatches)} microbatches, with the questions "
        f"{_listed(questions)}; {LOWER_LR}"
    )


def refuse_bad_gradient(norm: float, terms: Sequence[LossTerm]) -> None:
    """Raise UserError, on all ranks alike, for a gradient that is not finite where every loss was."""
    if not math.isfinite(norm):
        questions = _questions_of(terms, microbatches_of(terms))
        raise shared_error(
            f"the norm of the gradient is {norm}, while every loss of the step is finite; its questions are "
            f"{_listed(questions)}; {LOWER_LR}"
        )


def _questions_of(terms: Sequence[LossTerm], microbatches: Iterable[tuple[int, Microbatch]]) -> list[str]:
    """`file:line` of the questions that stand in microbatches."""
    return list(
        dict.fromkeys(
            terms[term].planned.batch.sets[sequence.question].where
            for term, microbatch in microbatches
            for sequence in microbatch.sequences
            if not sequence.is_pad
        )
    )


def _listed(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
