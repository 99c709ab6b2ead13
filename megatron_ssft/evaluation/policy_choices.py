"""Which tags a model chooses: the parts `policy` and `choices` of the record that policy_evaluation.py describes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ssft.evaluation.metrics import estimate
from megatron_ssft.evaluation.policy_inputs import Inputs
from megatron_ssft.evaluation.scored_runs import ScoredRun
from megatron_ssft.formats.policy import Policy, PolicyRow

STATES = ("before", "after")
Record = dict[str, "object"]


def policy_QN(policy: Policy, state: str, ids: Sequence[str]) -> np.ndarray:
    """float64 [Q, N] of the held-out questions: the first one written, or the last."""
    rows = _snapshot(policy, state)
    return np.array([rows[id].policy_N for id in ids])


def _snapshot(policy: Policy, state: str) -> Mapping[str, PolicyRow]:
    steps = policy["eval"]
    return steps[(min if state == "before" else max)(steps)]


def plain_estimate(values: np.ndarray | None) -> Record | None:
    """E of one value a question, NaN left out; None if none is left."""
    found = None if values is None else estimate(values)
    if found is None:
        return None
    stderr = None if math.isnan(found.stderr) else found.stderr
    return {"value": found.value, "stderr": stderr, "questions": found.questions}


def policy_figures(policy: Policy, ids: Sequence[str]) -> Record:
    """`policy` of the record."""
    entropy = {state: plain_estimate(entropies(policy_QN(policy, state, ids))) for state in STATES}
    mass = {state: plain_estimate(np.array([_snapshot(policy, state)[id].mass for id in ids])) for state in STATES}
    return {"iterations": [min(policy["eval"]), max(policy["eval"])], "entropy": entropy, "mass": mass}


def entropies(policy_QN: np.ndarray) -> np.ndarray:
    """float64 [Q], nats: -sum_i pi_i log pi_i."""
    return -(policy_QN * np.log(np.where(policy_QN > 0, policy_QN, 1.0))).sum(1)


def choices(inputs: Inputs, groups: Sequence[str] | None) -> list[Record]:
    """`choices` of the record; `groups` [Q] or None."""
    entries, ids = [], inputs.ids
    for state in STATES if inputs.policy is not None else ():
        mass_Q = np.array([_snapshot(inputs.policy, state)[id].mass for id in ids])
        entries.append(_choice("policy", state, policy_QN(inputs.policy, state, ids), 1 - mass_Q, groups))
    for source in ("own", "own_greedy"):
        for state, role in (("before", f"{source}_before"), ("after", source)):
            if role in inputs.runs:
                share_QN, outside_Q = _written(inputs.runs[role], ids, inputs.tags)
                entries.append(_choice(source, state, share_QN, outside_Q, groups))
    return entries


def _written(run: ScoredRun, ids: Sequence[str], tags: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of each question's samples: float64 [Q, N] with each tag, [Q] without one."""
    by_id = {q.id: [row.tag for row in q.pooled] for q in run.questions}
    share_QN = np.array([[by_id[id].count(tag) / len(by_id[id]) for tag in tags] for id in ids])
    return share_QN, np.array([by_id[id].count(None) / len(by_id[id]) for id in ids])


def _choice(
    source: str, state: str, share_QN: np.ndarray, outside_Q: np.ndarray, groups: Sequence[str] | None
) -> Record:
    """Means over all questions and over each group's."""
    found = []
    for group in [None, *(sorted(set(groups)) if groups is not None else [])]:
        rows = np.array([True if group is None else name == group for name in groups or [None] * len(share_QN)])
        share_N = share_QN[rows].mean(0)
        total = float(share_N.sum())
        found.append(
            {
                "group": group,
                "questions": int(rows.sum()),
                "share": (share_N / total).tolist() if total > 0 else None,
                "outside": max(0.0, float(outside_Q[rows].mean())),
            }
        )
    return {"source": source, "state": state, "groups": found}
