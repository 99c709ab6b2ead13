"""policy.jsonl: how probable each tag is under the learned policy, one line per question and evaluated step.

Each line says which question it is of, by the mark of its prompt, and which model the training began with. Files of
earlier versions lack both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import REPAIR, Count, read_rows
from megatron_ssft.formats.rollouts import Mark, mark
from megatron_ssft.records import TokenizedSet

Split = Literal["train", "eval"]
_ROUNDED = 1e-3
"""By how much sums of rounded probabilities may be off."""
Share = Annotated[float, Meta(ge=0, le=1 + _ROUNDED, description="a probability")]


class PolicyLine(Struct, frozen=True, kw_only=True):
    """One line."""

    iteration: Count
    """Steps done; 0 before the first."""
    split: Annotated[Split, Meta(description="train or eval")]
    id: Annotated[str, Meta(description="a string")]
    policy: Annotated[list[Share], Meta(min_length=1, description="a list with a probability for each tag")]
    """[N], given that a tag is written."""
    mass: Share
    """Probability that one is written."""
    prompt: Mark | UnsetType = UNSET
    """`mark` of the question's prompt, as in rollouts."""
    model: Annotated[str, Meta(description="a string")] | UnsetType = UNSET
    """Fingerprint of the model whose rewards are learned from, with which the training began."""


@dataclass(frozen=True)
class PolicyRow:
    """The policy of one question."""

    policy_N: np.ndarray
    """float64 [N], sums to 1: probability of each tag, given that one is written."""
    mass: float
    """Probability that one is written."""
    prompt: str | None = None
    """`mark` of the question's prompt; None in files of earlier versions."""
    model: str | None = None
    """Fingerprint of the model that the training began with; None in files of earlier versions."""


Policy = dict[str, dict[int, dict[str, PolicyRow]]]
"""Split (`train`, `eval`) -> iteration, ascending -> question's id -> its policy."""


def policy_lines(
    iteration: int,
    split: Split,
    questions: Sequence[TokenizedSet],
    policy_QN: np.ndarray,
    mass_Q: Iterable[float],
    model: str | None,
) -> Iterator[PolicyLine]:
    """The lines of one step."""
    for question, policy_N, mass in zip(questions, policy_QN, mass_Q):
        yield PolicyLine(
            iteration=iteration,
            split=split,
            id=question.id,
            policy=policy_N.tolist(),
            mass=float(mass),
            prompt=mark(question.prompt_ids.tolist()),
            model=UNSET if model is None else model,
        )


def read_policy(path: str | Path) -> Policy:
    """Read policy.jsonl; {} without any line. Of several lines for one question and step the last counts.

    A last line without its end, left by a writer that was killed, is skipped with a warning. Raises UserError.
    """
    snapshots: Policy = {}
    num_tags = model = None
    for number, row in read_rows(Path(path), PolicyLine, "the file; check the path", blank_lines=True):
        where = f"{path}:{number}"
        if not abs(sum(row.policy) - 1) <= _ROUNDED:
            raise UserError(f"{where}: 'policy' must sum to 1; {REPAIR}")
        num_tags = num_tags or len(row.policy)
        if len(row.policy) != num_tags:
            raise UserError(f"{where}: {len(row.policy)} tags, other lines have {num_tags}; keep one run in a file")
        model = model or row.model or None
        if row.model and row.model != model:
            raise UserError(
                f"{where}: of a run that began with model {row.model[:12]}, other lines with {str(model)[:12]}; keep "
                "one run in a file"
            )
        rows = snapshots.setdefault(row.split, {}).setdefault(row.iteration, {})
        rows[row.id] = PolicyRow(np.array(row.policy, np.float64), row.mass, row.prompt or None, row.model or None)
    return {split: dict(sorted(steps.items())) for split, steps in snapshots.items()}
