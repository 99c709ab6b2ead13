"""The result of a round, read from the files of its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from megatron_ssft.formats.run_folder import FINISHED, POLICY
from megatron_ssft.rounds.stages import read_record, read_rows


class RewardLine(msgspec.Struct, frozen=True):
    """One question of a rewards file."""

    id: str
    n: list[float]
    """Samples under each tag."""
    sum: list[float]
    """Sum of their rewards."""

    @property
    def mean_N(self) -> np.ndarray:
        """Mean reward of each tag, float64 [N]; 0 without samples."""
        return np.asarray(self.sum, dtype=np.float64) / np.maximum(np.asarray(self.n, dtype=np.float64), 1.0)


class PolicyLine(msgspec.Struct, frozen=True):
    """The policy of one question at one iteration, as policy.jsonl holds it."""

    iteration: int
    split: str
    id: str
    policy: list[float]
    mass: float | None = None


class MetricsLine(msgspec.Struct, frozen=True):
    """The columns of metrics.jsonl that a round's row takes its last values from."""

    entropy: float | None = None
    mass: float | None = None
    completion_nll_shift: float | None = None
    effective_sample_size: float | None = None


class RoundRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of rounds.jsonl; figures that the training does not give are left out."""

    round: int
    questions: int
    iterations: int | None = None
    reward_uniform: float | None = None
    """Mean reward of the tags, each as likely as the others."""
    reward_before: float | None = None
    """Mean over the round's questions of sum_i pi_i R_i under the policy before the training.

    The rewards are those measured in this round. None where there is no such policy (grpo)."""
    reward_after: float | None = None
    """The same mean under the policy after the training."""
    entropy: float | None = None
    """Mean entropy of the policy after the training, in nats."""
    mass: float | None = None
    """Mean probability after the training that a tag is written."""
    completion_nll_shift: float | None = None
    effective_sample_size: float | None = None
    reason: str | None = None
    """Why the training ended."""
    run: str


def round_row(number: int, folder: Path) -> RoundRow:
    """The row of round `number`, whose files are in `folder`. Raises UserError."""
    run, rewards = folder / "run", read_rows(folder / "rewards.jsonl", RewardLine)
    ending = read_record(run / FINISHED, _Ending)
    metrics = read_rows(run / "metrics.jsonl", MetricsLine)
    policies = [line for line in read_rows(run / POLICY, PolicyLine) if line.split == "train"]
    last_iteration = max((line.iteration for line in policies), default=0)
    before = [line for line in policies if line.iteration == 0]
    after = [line for line in policies if line.iteration == last_iteration]
    return RoundRow(
        round=number,
        questions=len(rewards),
        iterations=ending.iteration,
        reward_uniform=_mean([float(np.mean(line.mean_N)) for line in rewards]),
        reward_before=expected_reward(before, rewards),
        reward_after=expected_reward(after, rewards),
        entropy=_mean([_entropy(line.policy) for line in after]) if after else _last(m.entropy for m in metrics),
        mass=_mean([m.mass for m in after if m.mass is not None]) if after else _last(m.mass for m in metrics),
        completion_nll_shift=_last(m.completion_nll_shift for m in metrics),
        effective_sample_size=_last(m.effective_sample_size for m in metrics),
        reason=ending.reason,
        run=f"{folder.name}/run",
    )


class _Ending(msgspec.Struct, frozen=True):
    """finished.json of a training run."""

    iteration: int | None = None
    reason: str | None = None


def expected_reward(policies: Sequence[PolicyLine], rewards: Sequence[RewardLine]) -> float | None:
    """Mean of sum_i pi_i R_i over the questions that have both a policy and rewards; None if there are none."""
    mean_of_id = {line.id: line.mean_N for line in rewards}
    return _mean([float(np.dot(line.policy, mean_of_id[line.id])) for line in policies if line.id in mean_of_id])


def rounds_table(rows: Sequence[RoundRow]) -> Table:
    """A table for people: a line per round."""
    table = Table(title="rounds")
    columns = {
        "round": "round",
        "questions": "questions",
        "reward_uniform": "uniform",
        "reward_before": "before",
        "reward_after": "after",
        "entropy": "entropy",
        "mass": "mass",
        "effective_sample_size": "ESS",
        "reason": "ended",
    }
    for name in columns.values():
        table.add_column(name, justify="left" if name == "ended" else "right")
    for row in rows:
        table.add_row(*(_cell(getattr(row, name), ".2g" if name == "mass" else ".3f") for name in columns))
    return table


def _cell(value: object, spec: str) -> str:
    if value is None:
        return "-"
    return format(value, spec) if isinstance(value, float) else str(value)


def _entropy(policy: Sequence[float]) -> float:
    """Entropy of a question's policy, in nats."""
    p = np.asarray(policy, dtype=np.float64)
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _last(values: Iterable[float | None]) -> float | None:
    """The last value that is not None."""
    return next((value for value in reversed(list(values)) if value is not None), None)
