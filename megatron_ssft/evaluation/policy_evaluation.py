"""How well a model chooses its own tag, before and after its forking policy was trained, on held-out questions.

The record, which policy_evaluation.json holds; E is {value, stderr, questions}, a mean over questions with the standard
error of a sample of questions (all samples of a question form one cluster), null where it was not given or cannot be:

    files               role -> {file, model, mode, samples, samples_per_question [least, most]}
    rewards             {file, model, questions}
    questions           their number
    tags [N]            0-based
    samples_per_tag     {before, after}: [least, most] of a question's samples under a tag
    fixed_tag           {tag, mean_reward [N]}: g*, the tag of highest mean reward; the least of several
    group_by            name of the field, or null
    group_tags          null, or {before, rewards}: group -> [tags] that are best in it, several where they tie; chosen
                        on the held-out samples before, and on the rewards (null without groups of their questions)
    rows                [{key, name, before E, after E, note}]
    differences         [{key, name, value, stderr, questions}]: paired, question by question
    headroom_recovered  [{key, name, value, stderr, questions, gain, headroom}]: value = gain / headroom, null where
                        there is no headroom; the standard error is that of a ratio of two means (delta method)
    policy              null, or {iterations [first, last], entropy {before E, after E}, mass {before E, after E}}; nats
    choices             [{source, state, groups [{group, questions, share [N], outside}]}]: source policy, own or
                        own_greedy; state before or after; the first group, null, is all questions. share sums to 1 over
                        the tags (null if none was ever written), outside is the share of no tag
    groups              null, or question's id -> its group
    remarks             sentences

Keys of rows: own, own_greedy, expected, fixed, uniform, group, group_rewards, oracle, other_samples, grpo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.metrics import best_tag_by_other_samples
from megatron_ssft.evaluation.policy_choices import STATES, Record, choices, plain_estimate, policy_figures, policy_QN
from megatron_ssft.evaluation.policy_inputs import Inputs
from megatron_ssft.evaluation.scored_runs import ScoredRun

Values = dict[str, "np.ndarray | None"]
"""State -> float64 [Q], a figure of each question."""


@dataclass(frozen=True)
class Grouping:
    """Groups of questions."""

    field: str
    of: Mapping[str, str]
    """Held-out question's id -> its group."""
    of_training: Mapping[str, str] | None = None
    """The same for the questions of the rewards, where known."""


@dataclass(frozen=True)
class _Tables:
    """What was measured, by question (in the order of --before) and tag."""

    accuracy: dict[str, np.ndarray]
    """State -> float64 [Q, N]: share of correct samples."""
    groups: list[str] | None
    """[Q]"""


def evaluate_policy(inputs: Inputs, grouping: Grouping | None = None) -> Record:
    """The record described above, ready for json.dumps. Raises UserError where a question has no group."""
    ids, runs = inputs.ids, inputs.runs
    accuracy = {state: _accuracy(runs[state], ids) for state in STATES}
    tables = _Tables(accuracy, None if grouping is None else [_group(grouping.of, id, "--data") for id in ids])
    reward_QN = np.array([row.sum_N / row.n_N for row in inputs.rewards.rows.values()])
    fixed = int(np.flatnonzero(_best(reward_QN))[0])
    group_tags = None if grouping is None else _group_tags(tables, inputs, reward_QN, grouping)
    values = _values(inputs, tables, fixed, group_tags)
    sizes = {state: [len(s) for q in runs[state].questions for s in q.by_tag] for state in STATES}
    record = {
        "files": {role: _file(run) for role, run in runs.items()},
        "rewards": {"file": str(inputs.rewards.path), "model": inputs.rewards.model, "questions": len(reward_QN)},
        "questions": len(ids),
        "tags": list(inputs.tags),
        "samples_per_tag": {state: [min(sizes[state]), max(sizes[state])] for state in STATES},
        "fixed_tag": {"tag": inputs.tags[fixed], "mean_reward": reward_QN.mean(0).tolist()},
        "group_by": None if grouping is None else grouping.field,
        "group_tags": _tag_lists(group_tags, inputs.tags),
        "rows": [],
        "differences": _differences(values),
        "headroom_recovered": _headroom(values),
        "policy": None if inputs.policy is None else policy_figures(inputs.policy, ids),
        "choices": choices(inputs, tables.groups),
        "groups": None if grouping is None else dict(zip(ids, tables.groups)),
        "remarks": list(inputs.remarks),
    }  # fmt: skip
    record["rows"] = [_row(key, of, record) for key, of in values.items()]
    return record


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


def _group_tags(
    tables: _Tables, inputs: Inputs, reward_QN: np.ndarray, grouping: Grouping
) -> dict[str, dict[str, np.ndarray] | None]:
    """Group -> bool [N], its best tags: by the held-out samples before, and by the rewards."""
    of_rewards = None
    if grouping.of_training is not None:
        names = [_group(grouping.of_training, id, "--data-train") for id in inputs.rewards.rows]
        lacks = sorted(set(tables.groups) - set(names))
        if lacks:
            raise UserError(
                f"--data-train: no question of the rewards is of {grouping.field} {lacks[0]!r}; leave it out"
            )
        of_rewards = _best_by_group(reward_QN, names)
    return {"before": _best_by_group(tables.accuracy["before"], tables.groups), "rewards": of_rewards}


def _best_by_group(table_QN: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: _best(table_QN[[g == name for g in groups]]) for name in sorted(set(groups))}


def _values(inputs: Inputs, tables: _Tables, fixed: int, group_tags: Mapping[str, object] | None) -> dict[str, Values]:
    """Row's key -> its figure of each question, before and after."""
    runs, ids = inputs.runs, inputs.ids
    values = {
        "own": {"before": _pooled(runs, "own_before", ids), "after": _pooled(runs, "own", ids)},
        "own_greedy": {"before": _pooled(runs, "own_greedy_before", ids), "after": _pooled(runs, "own_greedy", ids)},
    }
    if inputs.policy is not None:
        values["expected"] = {
            state: (policy_QN(inputs.policy, state, ids) * tables.accuracy[state]).sum(1) for state in STATES
        }
    values["fixed"] = {state: tables.accuracy[state][:, fixed] for state in STATES}
    values["uniform"] = {state: tables.accuracy[state].mean(1) for state in STATES}
    for key, chosen in (("group", "before"), ("group_rewards", "rewards")):
        if group_tags is not None and group_tags[chosen] is not None:
            picked_QN = np.array([group_tags[chosen][name] for name in tables.groups])
            values[key] = {state: (tables.accuracy[state] * picked_QN).sum(1) / picked_QN.sum(1) for state in STATES}
    values["oracle"] = {state: tables.accuracy[state].max(1) for state in STATES}
    values["other_samples"] = {state: _by_other_samples(runs[state], ids) for state in STATES}
    if "grpo" in runs or "grpo_before" in runs:
        values["grpo"] = {"before": _pooled(runs, "grpo_before", ids), "after": _pooled(runs, "grpo", ids)}
    return values


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
    "fixed": "best fixed tag g*",
    "uniform": "uniform tags",
    "group": "best tag per group",
    "group_rewards": "best tag per group, by rewards",
    "oracle": "best tag per question",
    "other_samples": "best tag per question, halves",
    "grpo": "GRPO baseline",
}


def _row(key: str, of: Values, record: Record) -> Record:
    return {
        "key": key,
        "name": _NAMES[key].replace("group", str(record["group_by"])) if key.startswith("group") else _NAMES[key],
        **{state: plain_estimate(of[state]) for state in STATES},
        "note": _note(key, record),
    }


def _note(key: str, record: Record) -> str:
    """How the tag is chosen, in few words."""
    training = f"by {record['rewards']['questions']:,} training questions"
    sizes = {size for least_most in record["samples_per_tag"].values() for size in least_most}
    samples = "-".join(map(str, sorted({min(sizes), max(sizes)})))
    return {
        "own": "the model writes its tag",
        "own_greedy": "the model writes its likeliest tag",
        "expected": "by policy.jsonl, temperature 1",
        "fixed": f"<think{record['fixed_tag']['tag'] + 1}>, {training}",
        "uniform": "every tag equally often",
        "group": "an oracle: by the held-out samples before",
        "group_rewards": training,
        "oracle": f"by the same {samples} samples a tag: too high",
        "other_samples": f"by half of {samples} samples a tag, on the others",
        "grpo": "whole completions trained",
    }[key]


_DIFFERENCES = (
    ("own-fixed", "own choice - g*", ("own", "after"), ("fixed", "after")),
    ("own_greedy-fixed", "own choice, greedy - g*", ("own_greedy", "after"), ("fixed", "after")),
    ("own-fixed_before", "own choice - g* before", ("own", "after"), ("fixed", "before")),
    ("own-uniform", "own choice - uniform tags", ("own", "after"), ("uniform", "after")),
    ("own-own_before", "own choice, after - before", ("own", "after"), ("own", "before")),
    ("uniform-uniform_before", "uniform tags, after - before (modes intact)", ("uniform", "after"),
     ("uniform", "before")),
    ("own-grpo", "own choice - GRPO", ("own", "after"), ("grpo", "after")),
    ("grpo-grpo_before", "GRPO, after - before", ("grpo", "after"), ("grpo", "before")),
)  # fmt: skip


def _differences(values: Mapping[str, Values]) -> list[Record]:
    entries = []
    for key, name, (a, a_state), (b, b_state) in _DIFFERENCES:
        first, second = values.get(a, {}).get(a_state), values.get(b, {}).get(b_state)
        if first is not None and second is not None:
            entries.append({"key": key, "name": name, **plain_estimate(first - second)})
    return entries


def _headroom(values: Mapping[str, Values]) -> list[Record]:
    """(own - g*) / (best per group - g*): own choice after the training, the rest of the model before or after."""
    entries = []
    for group, how in (("group", ""), ("group_rewards", ", tags by rewards")):
        for state in STATES if group in values else ():
            fixed, best = values["fixed"][state], values[group][state]
            name = f"headroom of the model {state}{how}"
            entries.append(
                {"key": f"{group}_{state}", "name": name, **_ratio(values["own"]["after"] - fixed, best - fixed)}
            )
    return entries


def _ratio(gain_Q: np.ndarray, headroom_Q: np.ndarray) -> Record:
    """Ratio of two means over the same questions, its error to first order in theirs."""
    gain, headroom = float(gain_Q.mean()), float(headroom_Q.mean())
    found = {"value": None, "stderr": None, "questions": len(gain_Q), "gain": gain, "headroom": headroom}
    if headroom <= 1e-9:
        return found
    spread = plain_estimate((gain_Q - gain / headroom * headroom_Q) / headroom)
    return found | {"value": gain / headroom, "stderr": spread["stderr"]}


def _tag_lists(group_tags: Mapping[str, object] | None, tags: Sequence[int]) -> Record | None:
    if group_tags is None:
        return None
    return {
        chosen: None if of is None else {name: [t for t, best in zip(tags, mask) if best] for name, mask in of.items()}
        for chosen, of in group_tags.items()
    }


def _file(run: ScoredRun) -> Record:
    sizes = [len(question.pooled) for question in run.questions]
    return {
        "file": run.file,
        "model": run.rows[0].model,
        "mode": run.rows[0].sampling["mode"],
        "samples": len(run.rows),
        "samples_per_question": [min(sizes), max(sizes)],
    }
