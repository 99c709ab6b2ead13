"""Made-up inputs of a policy's evaluation: four held-out questions, two tags, two samples each."""

from __future__ import annotations

import json

from megatron_ssft.evaluation.policy_evaluation import Grouping, evaluate_policy
from megatron_ssft.evaluation.policy_inputs import load_inputs
from megatron_ssft.evaluation.policy_tables import policy_tables
from megatron_ssft.formats.rollouts import ScoredRollout, mark, write_scored

MODES = {"own": "own", "own_greedy": "own-greedy", "own_before": "own", "own_greedy_before": "own-greedy",
         "grpo": "none", "grpo_before": "none"}  # fmt: skip
MODELS = {"before": "old", "own_before": "old", "own_greedy_before": "old", "grpo": "rl", "grpo_before": "mixed"}

BEFORE = {"a": ["11", "00"], "b": ["10", "00"], "c": ["00", "11"], "d": ["01", "11"]}
AFTER = {**BEFORE, "a": ["11", "01"]}
"""Question -> for each tag whether its samples are right."""
OWN = {"a": "0+ 0+ -. 0+", "b": "0+ 0. 1. 0+", "c": "1+ 1+ 1+ 1+", "d": "1+ 1+ 1+ 0+"}
"""Question -> samples that the model began by itself: tag (- for none) and whether it is right."""
GREEDY = {"a": "0+ 0+", "b": "0+ 0.", "c": "1+ 1+", "d": "1+ 1+"}
OWN_BEFORE = {"a": "0+ 1.", "b": "0. 1.", "c": "0. 1+", "d": "-. -."}
POLICY = {0: {q: [0.5, 0.5] for q in "abcd"}, 5: {"a": [0.8, 0.2], "b": [1, 0], "c": [0.25, 0.75], "d": [0, 1]}}
MASS = {0: 0.75, 5: 1.0}
REWARDS = {"t1": [0, 2], "t2": [1, 1], "t3": [1, 2], "t4": [2, 1]}
"""Training question -> right ones of two samples a tag."""
GROUPS = {"a": "x", "b": "x", "c": "y", "d": "y"}
GROUPS_TRAIN = {"t1": "x", "t2": "x", "t3": "x", "t4": "y"}
"""By the rewards tag 1 is best in x and tag 0 in y, the other way round than on the held-out questions."""


def sample(id, tag, number, right, role, **fields):
    defaults = {
        "finish_reason": "stop",
        "seed": 1,
        "sampling": {"mode": MODES.get(role, "each"), "temperature": 0.7, "seed": 1},
        "model": MODELS.get(role, "new") * 16,
        "tokenizer": "t",
        "correct": right,
        "answer": "1",
        "verdict": "correct" if right else "wrong",
        "verifier": "exact",
        "num_tokens": 5,
        "truncated": False,
        "prompt": mark(id),
    }
    return ScoredRollout(id=id, tag=tag, sample=number, **{**defaults, **fields})


def each(role, table, **fields):
    return [
        sample(id, tag, number, right == "1", role, **fields)
        for id, by_tag in table.items()
        for tag, flags in enumerate(by_tag)
        for number, right in enumerate(flags)
    ]


def began(role, table, **fields):
    return [
        sample(id, None if text[0] == "-" else int(text[0]), number, text[1] == "+", role, **fields)
        for id, texts in table.items()
        for number, text in enumerate(texts.split())
    ]


def plain(table):
    return {id: " ".join("-" + text[1] for text in texts.split()) for id, texts in table.items()}


def rows_of_all():
    return {
        "before": each("before", BEFORE),
        "after": each("after", AFTER),
        "own": began("own", OWN),
        "own_greedy": began("own_greedy", GREEDY),
        "own_before": began("own_before", OWN_BEFORE),
        "own_greedy_before": began("own_greedy_before", OWN_BEFORE),
        "grpo": began("grpo", plain(GREEDY)),
        "grpo_before": began("grpo_before", plain(OWN_BEFORE)),
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reward_rows(rewards=None, model="old" * 16):
    return [
        {"id": id, "tags": [0, 1], "n": [2, 2], "sum": right, "truncated": [0, 0], "verifier": "exact", "model": model}
        | {"prompt": mark(id)}
        for id, right in (rewards or REWARDS).items()
    ]


def policy_rows(policy=None, split="eval", model="old" * 16):
    return [
        {"iteration": step, "split": split, "id": id, "policy": pi, "mass": MASS.get(step, 1.0)}
        | {"prompt": mark(id), "model": model}
        for step, of in (policy or POLICY).items()
        for id, pi in of.items()
    ]


def make_files(folder, roles=("before", "after", "own", "own_greedy"), **replaced):
    """Scored files of `roles`, rewards, policy; `replaced`: other rows for some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = {role: folder / f"{role}.jsonl" for role in roles}
    rows = {**rows_of_all(), **replaced}
    for role, path in scored.items():
        write_scored(path, rows[role])
    rewards = write_lines(folder / "rewards.jsonl", replaced.get("rewards", reward_rows()))
    policy = write_lines(folder / "policy.jsonl", replaced.get("policy", policy_rows()))
    return scored, rewards, policy


def evaluated(folder, roles=tuple(MODES) + ("before", "after"), grouped=True, **replaced):
    scored, rewards, policy = make_files(folder, roles, **replaced)
    grouping = Grouping("operation", GROUPS, GROUPS_TRAIN) if grouped else None
    record = evaluate_policy(load_inputs(scored, rewards, policy), grouping)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for table in policy_tables(record):
        assert all(len(row) == len(table.header) for row in table.rows)
    return record
