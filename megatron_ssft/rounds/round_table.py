"""The result of a round, read from the files of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from megatron_ssft.errors import UserError
from megatron_ssft.formats.metrics import METRICS, Metrics, load_metrics
from megatron_ssft.formats.policy import PolicyRow, read_policy
from megatron_ssft.formats.rewards import RewardLine, read_reward_lines
from megatron_ssft.formats.run_folder import FINISHED, POLICY
from megatron_ssft.rounds.stages import read_record


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
    run, rewards = folder / "run", _rewards(folder / "rewards.jsonl")
    ending, metrics = read_record(run / FINISHED, _Ending), _metrics(run)
    steps = list(_policies(run / POLICY).items())
    for _, rows in steps:
        _refuse_others(run / POLICY, rows, folder / "rewards.jsonl", rewards)
    before = next((rows for iteration, rows in steps if iteration == 0), {})
    after = steps[-1][1] if steps else {}
    return RoundRow(
        round=number,
        questions=len(rewards),
        iterations=ending.iteration,
        reward_uniform=_mean([float(np.mean(line.mean_N)) for line in rewards.values()]),
        reward_before=expected_reward(before, rewards),
        reward_after=expected_reward(after, rewards),
        entropy=_mean([_entropy(row.policy_N) for row in after.values()]) if after else _last(metrics["entropy"]),
        mass=_mean([row.mass for row in after.values()]) if after else _last(metrics["mass"]),
        completion_nll_shift=_last(metrics["completion_nll_shift"]),
        effective_sample_size=_last(metrics["effective_sample_size"]),
        reason=ending.reason,
        run=f"{folder.name}/run",
    )


class _Ending(msgspec.Struct, frozen=True):
    """finished.json of a training run."""

    iteration: int | None = None
    reason: str | None = None


def _rewards(path: Path) -> dict[str, RewardLine]:
    """Question's id -> its rewards; empty if the file is not there. Raises UserError."""
    return read_reward_lines(path) if path.exists() else {}


def _metrics(run: Path) -> Metrics:
    """Log of the training; empty if it is not there. Raises UserError."""
    return load_metrics(run) if (run / METRICS).exists() else Metrics({"iteration": np.zeros(0)})


def _policies(path: Path) -> dict[int, dict[str, PolicyRow]]:
    """Iteration, ascending -> policies of the training questions; empty if the file is not there. Raises UserError."""
    return read_policy(path).get("train", {}) if path.exists() else {}


def _refuse_others(log: Path, policies: Mapping[str, PolicyRow], path: Path, rewards: Mapping[str, RewardLine]) -> None:
    """Raise UserError where policies and rewards of the same ids are of two models or two prompts."""
    for id, row in policies.items():
        line = rewards.get(id)
        if line is None:
            continue
        for what, own, other in (("model", row.model, line.model), ("prompt", row.prompt, line.prompt)):
            if own and other and own != other:
                raise UserError(
                    f"{log}: id {id!r} is of {what} {own[:12]}, in {path} of {other[:12]}: not of one round; remove "
                    "the round's folder to begin the round again"
                )


def expected_reward(policies: Mapping[str, PolicyRow], rewards: Mapping[str, RewardLine]) -> float | None:
    """Mean of sum_i pi_i R_i over the questions that have both a policy and rewards; None if there are none."""
    return _mean([float(np.dot(row.policy_N, rewards[id].mean_N)) for id, row in policies.items() if id in rewards])


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


def _entropy(p: np.ndarray) -> float:
    """Entropy of a question's policy, in nats."""
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _last(column: np.ndarray) -> float | None:
    """The last value of a column of the log; None if there is none."""
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None
