"""policy.jsonl: how probable each tag is under the learned policy, one line per question and evaluated step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import REPAIR, Count, read_rows

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


@dataclass(frozen=True)
class PolicyRow:
    """The policy of one question."""

    policy_N: np.ndarray
    """float64 [N], sums to 1: probability of each tag, given that one is written."""
    mass: float
    """Probability that one is written."""


Policy = dict[str, dict[int, dict[str, PolicyRow]]]
"""Split (`train`, `eval`) -> iteration, ascending -> question's id -> its policy."""


def policy_lines(
    iteration: int, split: Split, ids: Sequence[str], policy_QN: np.ndarray, mass_Q: Iterable[float]
) -> Iterator[PolicyLine]:
    """The lines of one step."""
    for id, policy_N, mass in zip(ids, policy_QN, mass_Q):
        yield PolicyLine(iteration=iteration, split=split, id=id, policy=policy_N.tolist(), mass=float(mass))


def read_policy(path: str | Path) -> Policy:
    """Read policy.jsonl; {} without any line. Of several lines for one question and step the last counts.

    A last line without its end, left by a writer that was killed, is skipped with a warning. Raises UserError.
    """
    snapshots: Policy = {}
    num_tags = None
    for number, row in read_rows(Path(path), PolicyLine, "the file; check the path", blank_lines=True):
        where = f"{path}:{number}"
        if not abs(sum(row.policy) - 1) <= _ROUNDED:
            raise UserError(f"{where}: 'policy' must sum to 1; {REPAIR}")
        num_tags = num_tags or len(row.policy)
        if len(row.policy) != num_tags:
            raise UserError(f"{where}: {len(row.policy)} tags, other lines have {num_tags}; keep one run in a file")
        rows = snapshots.setdefault(row.split, {}).setdefault(row.iteration, {})
        rows[row.id] = PolicyRow(np.array(row.policy, np.float64), row.mass)
    return {split: dict(sorted(steps.items())) for split, steps in snapshots.items()}
