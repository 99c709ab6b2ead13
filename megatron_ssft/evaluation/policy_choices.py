"""Tags that a model chooses: the parts `policy` and `choices` of policy_evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ssft.evaluation.metrics import estimate, estimate_record
from megatron_ssft.evaluation.policy_inputs import Inputs
from megatron_ssft.evaluation.scored_runs import ScoredRun
from megatron_ssft.formats.evaluation import MaybeEstimate
from megatron_ssft.formats.policy import Policy, PolicyRow
from megatron_ssft.formats.policy_evaluation import (
    STATES,
    BeforeAfter,
    Choice,
    ChoiceOfGroup,
    PolicyFigures,
    Source,
    State,
)


def policy_QN(policy: Policy, state: State, ids: Sequence[str]) -> np.ndarray:
    """float64 [Q, N] of the held-out questions: the first one written, or the last."""
    rows = _snapshot(policy, state)
    return np.array([rows[id].policy_N for id in ids])


def _snapshot(policy: Policy, state: State) -> Mapping[str, PolicyRow]:
    steps = policy["eval"]
    return steps[(min if state == "before" else max)(steps)]


def plain_estimate(values_Q: np.ndarray | None) -> MaybeEstimate:
    """Mean and error of one value per question, NaN left out; None if none is left."""
    return None if values_Q is None else estimate_record(estimate(values_Q))


def policy_figures(policy: Policy, ids: Sequence[str]) -> PolicyFigures:
    """`policy` of the record."""
    mass_Q = {state: np.array([_snapshot(policy, state)[id].mass for id in ids]) for state in STATES}
    entropy: BeforeAfter = {
        "before": plain_estimate(entropies(policy_QN(policy, "before", ids))),
        "after": plain_estimate(entropies(policy_QN(policy, "after", ids))),
    }
    mass: BeforeAfter = {"before": plain_estimate(mass_Q["before"]), "after": plain_estimate(mass_Q["after"])}
    return {"iterations": [min(policy["eval"]), max(policy["eval"])], "entropy": entropy, "mass": mass}


def entropies(policy_QN: np.ndarray) -> np.ndarray:
    """float64 [Q], nats: -sum_i pi_i log pi_i."""
    return -(policy_QN * np.log(np.where(policy_QN > 0, policy_QN, 1.0))).sum(1)


def choices(inputs: Inputs, groups: Sequence[str] | None) -> list[Choice]:
    """`choices` of the record; `groups` [Q] or None."""
    entries, ids, policy = [], inputs.ids, inputs.policy
    if policy is not None:
        for state in STATES:
            mass_Q = np.array([_snapshot(policy, state)[id].mass for id in ids])
            entries.append(_choice("policy", state, policy_QN(policy, state, ids), 1 - mass_Q, groups))
    sources: tuple[Source, Source] = ("own", "own_greedy")
    for source in sources:
        for state in STATES:
            role = f"{source}_before" if state == "before" else source
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
    source: Source, state: State, share_QN: np.ndarray, outside_Q: np.ndarray, groups: Sequence[str] | None
) -> Choice:
    """Means over all questions and over each group's."""
    everything = np.ones(len(share_QN), bool)
    entries = [_of_group(None, everything, share_QN, outside_Q)]
    for group in sorted(set(groups)) if groups is not None else []:
        rows = np.array([name == group for name in groups or []])
        entries.append(_of_group(group, rows, share_QN, outside_Q))
    return {"source": source, "state": state, "groups": entries}


def _of_group(group: str | None, rows: np.ndarray, share_QN: np.ndarray, outside_Q: np.ndarray) -> ChoiceOfGroup:
    """`rows`: bool [Q]."""
    share_N = share_QN[rows].mean(0)
    total = float(share_N.sum())
    return {
        "group": group,
        "questions": int(rows.sum()),
        "share": (share_N / total).tolist() if total > 0 else None,
        "outside": max(0.0, float(outside_Q[rows].mean())),
    }
