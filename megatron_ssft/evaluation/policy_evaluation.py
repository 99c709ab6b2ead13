"""The evaluation of a learned choice of tag: a model before and after its forking policy was trained, on held-out
questions.

The document is that of formats/policy_evaluation.py. Means are over questions with the standard error of a sample of
questions: all samples of a question form one cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.metrics import best_tag_by_other_samples
from megatron_ssft.evaluation.policy_choices import choices, plain_estimate, policy_figures, policy_QN
from megatron_ssft.evaluation.policy_inputs import Inputs
from megatron_ssft.evaluation.scored_runs import ScoredRun
from megatron_ssft.formats.policy_evaluation import (
    STATES,
    Difference,
    FileRecord,
    GroupTags,
    PolicyEvaluationRecord,
    Ratio,
    RowRecord,
    State,
)

Values = dict[State, "np.ndarray | None"]
"""float64 [Q], a figure of each question, for each state."""
Masks = dict[str, np.ndarray]
"""Group -> bool [N]: its best tags."""


@dataclass(frozen=True)
class Grouping:
    """Groups of questions."""

    field: str
    of: Mapping[str, str]
    """Held-out question's id -> its group."""
    of_training: Mapping[str, str] | None = None
    """Question of the rewards -> its group, where known."""


@dataclass(frozen=True)
class _Groups:
    """Groups of the held-out questions, and the best tags of each."""

    names: list[str]
    """[Q]"""
    by_samples: Masks
    """By the held-out samples before."""
    by_rewards: Masks | None
    """None without groups of the rewards' questions."""


def evaluate_policy(inputs: Inputs, grouping: Grouping | None = None) -> PolicyEvaluationRecord:
    """Compute the document. Raises UserError where a question has no group."""
    ids, runs = inputs.ids, inputs.runs
    accuracy_QN = {state: _accuracy(runs[state], ids) for state in STATES}
    reward_QN = np.array([row.sum_N / row.n_N for row in inputs.rewards.rows.values()])
    fixed = int(np.flatnonzero(_best(reward_QN))[0])
    groups = None if grouping is None else _group_questions(inputs, grouping, accuracy_QN["before"], reward_QN)
    values = _values(inputs, accuracy_QN, fixed, groups)
    sizes = {state: [len(s) for q in runs[state].questions for s in q.by_tag] for state in STATES}
    least_most = {state: [min(sizes[state]), max(sizes[state])] for state in STATES}
    words = _Words(
        group_by=str(None if grouping is None else grouping.field),
        training_questions=len(reward_QN),
        samples="-".join(map(str, sorted({min(map(min, sizes.values())), max(map(max, sizes.values()))}))),
        fixed_tag=inputs.tags[fixed],
    )
    return {
        "files": {role: _file(run) for role, run in runs.items()},
        "rewards": {"file": str(inputs.rewards.path), "model": inputs.rewards.model, "questions": len(reward_QN)},
        "questions": len(ids),
        "tags": list(inputs.tags),
        "samples_per_tag": {"before": least_most["before"], "after": least_most["after"]},
        "fixed_tag": {"tag": inputs.tags[fixed], "mean_reward": reward_QN.mean(0).tolist()},
        "group_by": None if grouping is None else grouping.field,
        "group_tags": None if groups is None else _tag_lists(groups, inputs.tags),
        "rows": [_row(key, of, words) for key, of in values.items()],
        "differences": _differences(values),
        "headroom_recovered": _headroom(values),
        "policy": None if inputs.policy is None else policy_figures(inputs.policy, ids),
        "choices": choices(inputs, None if groups is None else groups.names),
        "groups": None if groups is None else dict(zip(ids, groups.names)),
        "remarks": list(inputs.remarks),
    }


def _accuracy(run: ScoredRun, ids: Sequence[str]) -> np.ndarray:
    by_id = {question.id: question.accuracy_N for question in run.questions}
    return np.array([by_id[id] for id in ids])


def _group(groups: Mapping[str, str], id: str, where: str) -> str:
    if id not in groups:
        raise UserError(f"question {id!r} is not in {where}; give the file that its answers were generated from")
    return groups[id]


def _best(table_QN: np.ndarray) -> np.ndarray:
    """bool [N]: the tags of highest mean, several where they tie."""
    means = table_QN.mean(0)
    return means >= means.max() - 1e-12  # equal shares summed in another order


# -- figures of each question ----------------------------------------------------------------------------------------


def _group_questions(inputs: Inputs, grouping: Grouping, accuracy_QN: np.ndarray, reward_QN: np.ndarray) -> _Groups:
    """`accuracy_QN`: of the held-out samples before."""
    names = [_group(grouping.of, id, "--data") for id in inputs.ids]
    by_rewards = None
    if grouping.of_training is not None:
        training_names = [_group(grouping.of_training, id, "--data-train") for id in inputs.rewards.rows]
        lacks = sorted(set(names) - set(training_names))
        if lacks:
            raise UserError(
                f"--data-train: no question of the rewards is of {grouping.field} {lacks[0]!r}; leave it out"
            )
        by_rewards = _best_by_group(reward_QN, training_names)
    return _Groups(names, _best_by_group(accuracy_QN, names), by_rewards)


def _best_by_group(table_QN: np.ndarray, groups: Sequence[str]) -> Masks:
    return {name: _best(table_QN[[g == name for g in groups]]) for name in sorted(set(groups))}


def _values(
    inputs: Inputs, accuracy_QN: Mapping[State, np.ndarray], fixed: int, groups: _Groups | None
) -> dict[str, Values]:
    """Row's key -> its figure of each question, before and after."""
    runs, ids = inputs.runs, inputs.ids
    values: dict[str, Values] = {
        "own": {"before": _pooled(runs, "own_before", ids), "after": _pooled(runs, "own", ids)},
        "own_greedy": {"before": _pooled(runs, "own_greedy_before", ids), "after": _pooled(runs, "own_greedy", ids)},
    }
    if inputs.policy is not None:
        policy = inputs.policy
        values["expected"] = {s: (policy_QN(policy, s, ids) * accuracy_QN[s]).sum(1) for s in STATES}
    values["fixed"] = {state: accuracy_QN[state][:, fixed] for state in STATES}
    values["uniform"] = {state: accuracy_QN[state].mean(1) for state in STATES}
    if groups is not None:
        values["group"] = _picked(accuracy_QN, groups.names, groups.by_samples)
        if groups.by_rewards is not None:
            values["group_rewards"] = _picked(accuracy_QN, groups.names, groups.by_rewards)
    values["oracle"] = {state: accuracy_QN[state].max(1) for state in STATES}
    values["other_samples"] = {state: _by_other_samples(runs[state], ids) for state in STATES}
    if "grpo" in runs or "grpo_before" in runs:
        values["grpo"] = {"before": _pooled(runs, "grpo_before", ids), "after": _pooled(runs, "grpo", ids)}
    return values


def _picked(accuracy_QN: Mapping[State, np.ndarray], names: Sequence[str], best: Masks) -> Values:
    """Accuracy under the best tags of each question's group."""
    picked_QN = np.array([best[name] for name in names])
    return {state: (accuracy_QN[state] * picked_QN).sum(1) / picked_QN.sum(1) for state in STATES}


def _pooled(runs: Mapping[str, ScoredRun], role: str, ids: Sequence[str]) -> np.ndarray | None:
    """float64 [Q]: share of correct samples of each question."""
    if role not in runs:
        return None
    by_id = {q.id: np.mean([row.correct for row in q.pooled]) for q in runs[role].questions}
    return np.array([by_id[id] for id in ids])


def _by_other_samples(run: ScoredRun, ids: Sequence[str]) -> np.ndarray:
    """float64 [Q]: of the best tag, chosen on half of the samples, measured on the other; NaN for single samples."""
    by_id = {q.id: best_tag_by_other_samples([[r.correct for r in rows] for rows in q.by_tag]) for q in run.questions}
    return np.array([by_id[id] for id in ids])


# -- means, differences, ratios --------------------------------------------------------------------------------------


_NAMES = {
    "own": "own choice, sampled",
    "own_greedy": "own choice, greedy",
    "expected": "own choice, expected",
    "fixed": "best fixed tag",
    "uniform": "uniform tags",
    "group": "best tag per group",
    "group_rewards": "best tag per group, by rewards",
    "oracle": "best tag per question",
    "other_samples": "best tag per question, halves",
    "grpo": "GRPO baseline",
}


@dataclass(frozen=True)
class _Words:
    """Values that the names and notes of the rows mention."""

    group_by: str
    training_questions: int
    samples: str
    """Samples per question and tag: one number, or least-most."""
    fixed_tag: int


def _row(key: str, values: Values, words: _Words) -> RowRecord:
    name = _NAMES[key].replace("group", words.group_by) if key.startswith("group") else _NAMES[key]
    before, after = plain_estimate(values["before"]), plain_estimate(values["after"])
    return {"key": key, "name": name, "before": before, "after": after, "note": _note(key, words)}


def _note(key: str, words: _Words) -> str:
    """A few words on how the tag is chosen."""
    training = f"by {words.training_questions:,} training questions"
    return {
        "own": "the model writes its tag",
        "own_greedy": "the model writes its likeliest tag",
        "expected": "by policy.jsonl, temperature 1",
        "fixed": f"<think{words.fixed_tag + 1}>, {training}",
        "uniform": "every tag equally often",
        "group": "an oracle: by the held-out samples before",
        "group_rewards": training,
        "oracle": f"by the same {words.samples} samples per tag: too high",
        "other_samples": f"by half of {words.samples} samples per tag, on the others",
        "grpo": "whole completions trained",
    }[key]


_Place = tuple[str, State]
_DIFFERENCES: tuple[tuple[str, str, _Place, _Place], ...] = (
    ("own-fixed", "own choice - best fixed tag", ("own", "after"), ("fixed", "after")),
    ("own_greedy-fixed", "own choice, greedy - best fixed tag", ("own_greedy", "after"), ("fixed", "after")),
    ("own-fixed_before", "own choice - best fixed tag before", ("own", "after"), ("fixed", "before")),
    ("own-uniform", "own choice - uniform tags", ("own", "after"), ("uniform", "after")),
    ("own-own_before", "own choice, after - before", ("own", "after"), ("own", "before")),
    ("uniform-uniform_before", "uniform tags, after - before (modes intact)", ("uniform", "after"),
     ("uniform", "before")),
    ("own-grpo", "own choice - GRPO", ("own", "after"), ("grpo", "after")),
    ("grpo-grpo_before", "GRPO, after - before", ("grpo", "after"), ("grpo", "before")),
)  # fmt: skip


def _differences(values: Mapping[str, Values]) -> list[Difference]:
    entries: list[Difference] = []
    for key, name, (a, a_state), (b, b_state) in _DIFFERENCES:
        first, second = values.get(a, {}).get(a_state), values.get(b, {}).get(b_state)
        if first is not None and second is not None:
            difference = plain_estimate(first - second)
            assert difference is not None, "there are questions"
            entries.append({"key": key, "name": name, **difference})
    return entries


def _headroom(values: Mapping[str, Values]) -> list[Ratio]:
    """(own - fixed) / (best per group - fixed): own choice after training, the rest of the model before or after."""
    entries = []
    own = values["own"]["after"]
    for group, how in (("group", ""), ("group_rewards", ", tags by rewards")):
        for state in STATES if group in values else ():
            fixed, best = values["fixed"][state], values[group][state]
            assert own is not None and fixed is not None and best is not None, "measured in both states"
            name = f"headroom of the model {state}{how}"
            entries.append(_ratio(f"{group}_{state}", name, own - fixed, best - fixed))
    return entries


def _ratio(key: str, name: str, gain_Q: np.ndarray, headroom_Q: np.ndarray) -> Ratio:
    """Ratio of two means over the same questions, its error to first order in theirs (delta method)."""
    gain, headroom = float(gain_Q.mean()), float(headroom_Q.mean())
    value = stderr = None
    if headroom > 1e-9:
        value = gain / headroom
        spread = plain_estimate((gain_Q - gain / headroom * headroom_Q) / headroom)
        stderr = None if spread is None else spread["stderr"]
    return {
        "key": key,
        "name": name,
        "value": value,
        "stderr": stderr,
        "questions": len(gain_Q),
        "gain": gain,
        "headroom": headroom,
    }


def _tag_lists(groups: _Groups, tags: Sequence[int]) -> GroupTags:
    def lists(masks: Masks) -> dict[str, list[int]]:
        return {name: [tag for tag, best in zip(tags, mask) if best] for name, mask in masks.items()}

    by_rewards = groups.by_rewards
    return {"before": lists(groups.by_samples), "rewards": None if by_rewards is None else lists(by_rewards)}


def _file(run: ScoredRun) -> FileRecord:
    sizes = [len(question.pooled) for question in run.questions]
    return {
        "file": run.file,
        "model": run.rows[0].model,
        "mode": run.rows[0].mode,
        "samples": len(run.rows),
        "samples_per_question": [min(sizes), max(sizes)],
    }
