"""What a round came to, read from the files of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_ssft.formats.run_folder import FINISHED, POLICY
from megatron_ssft.rounds.stages import read_json, read_rows

Row = Mapping[str, object]


def round_row(number: int, folder: Path) -> dict[str, object]:
    """One line of rounds.jsonl; figures that the training does not give are left out.

    reward_before, reward_after: mean over the round's questions of sum_i pi_i R_i under the policy at the start and at
    the end of the training, with the rewards measured in this round; where there is no such policy (grpo), there are no
    such figures. entropy (nats) and mass belong to the policy at the end.
    """
    run, rewards = folder / "run", read_rows(folder / "rewards.jsonl")
    finished, metrics = read_json(run / FINISHED), read_rows(run / "metrics.jsonl")
    row: dict[str, object] = {
        "round": number,
        "questions": len(rewards),
        "iterations": finished.get("iteration"),
        "reward_uniform": _mean([np.mean(mean_rewards(line)) for line in rewards]),
    }
    policies = [line for line in read_rows(run / POLICY) if line.get("split") == "train"]
    first = [line for line in policies if line["iteration"] == 0]
    end = max((line["iteration"] for line in policies), default=0)
    last = [line for line in policies if line["iteration"] == end]
    row["reward_before"] = expected_reward(first, rewards)
    if last:
        row |= {"reward_after": expected_reward(last, rewards), "entropy": _mean([_entropy(x["policy"]) for x in last])}
        row["mass"] = _mean([x["mass"] for x in last if "mass" in x])
    else:
        row |= {name: _end_of(metrics, name) for name in ("entropy", "mass")}
    for name in ("completion_nll_shift", "effective_sample_size"):
        row[name] = _end_of(metrics, name)
    row |= {"reason": finished.get("reason"), "run": f"{folder.name}/run"}
    return {name: value for name, value in row.items() if value is not None}


def mean_rewards(line: Row) -> np.ndarray:
    """Mean reward of each tag, float64 [N], from a line of a rewards file; 0 without samples."""
    return np.asarray(line["sum"], dtype=np.float64) / np.maximum(np.asarray(line["n"], dtype=np.float64), 1.0)


def expected_reward(policies: Sequence[Row], rewards: Sequence[Row]) -> float | None:
    """Mean over questions of sum_i pi_i R_i; of the questions that both know. None if there are none."""
    by_id = {line["id"]: mean_rewards(line) for line in rewards}
    found = [float(np.dot(line["policy"], by_id[line["id"]])) for line in policies if line["id"] in by_id]
    return _mean(found)


def rounds_table(rows: Sequence[Row]) -> Table:
    """For people: a line a round."""
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
        table.add_row(*(_cell(row.get(name), ".2g" if name == "mass" else ".3f") for name in columns))
    return table


def _cell(value: object, spec: str) -> str:
    if value is None:
        return "-"
    return format(value, spec) if isinstance(value, float) else str(value)


def _entropy(policy: object) -> float:
    """Nats."""
    p = np.asarray(policy, dtype=np.float64)
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _end_of(metrics: Sequence[Row], name: str) -> object:
    """The last value of that name."""
    return next((line[name] for line in reversed(metrics) if line.get(name) is not None), None)
