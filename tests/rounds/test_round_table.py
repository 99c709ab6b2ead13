"""The row of a round, from made-up files of its training."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.rounds.round_table import round_row


def test_the_row_of_a_round(tmp_path):
    run = tmp_path / "round_004" / "run"
    run.mkdir(parents=True)
    rewards = [
        {"id": "a", "tags": [0, 1], "n": [2, 4], "sum": [2, 0], "truncated": [0, 0], "model": "m"},
        {"id": "b", "tags": [0, 1], "n": [2, 0], "sum": [1, 0], "truncated": [0, 0], "model": "m"},
    ]
    policy = [
        {"iteration": 0, "split": "train", "id": "a", "policy": [0.5, 0.5], "mass": 0.5},
        {"iteration": 0, "split": "train", "id": "b", "policy": [0.5, 0.5], "mass": 0.5},
        {"iteration": 9, "split": "train", "id": "a", "policy": [1.0, 0.0], "mass": 0.75},
        {"iteration": 9, "split": "train", "id": "b", "policy": [0.5, 0.5], "mass": 0.25},
        {"iteration": 9, "split": "eval", "id": "c", "policy": [0.0, 1.0], "mass": 0.0},
    ]
    for path, rows in ((run.parent / "rewards.jsonl", rewards), (run / "policy.jsonl", policy)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"iteration": 8, "reward": 0.3, "effective_sample_size": 0.4}, {"iteration": 9, "reward": 0.6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run / "finished.json").write_text('{"iteration": 9, "reason": "stale rewards"}')
    row = msgspec.to_builtins(round_row(4, run.parent))
    assert row == {
        "round": 4, "questions": 2, "iterations": 9, "reward_uniform": 0.375, "reward_before": 0.375,
        "reward_after": 0.625, "entropy": pytest.approx(np.log(2) / 2), "mass": 0.5, "effective_sample_size": 0.4,
        "reason": "stale rewards", "run": "round_004/run",
    }  # fmt: skip
    (run / "policy.jsonl").unlink()  # as for grpo
    row = msgspec.to_builtins(round_row(4, run.parent))
    assert not {"reward_before", "reward_after", "mass"} & row.keys()


def test_damaged_files_are_one_line(tmp_path):
    run = tmp_path / "round_000" / "run"
    run.mkdir(parents=True)
    (run / "finished.json").write_text('{"iteration": 1, "reason": "done"}')
    assert round_row(0, run.parent).iterations == 1
    for path, text in (
        (run / "finished.json", '{"iteration": "many"}'),
        (run / "metrics.jsonl", '{"entropy": "high"}\n'),
        (run / "policy.jsonl", '{"iteration": 0, "split": "train"}\n'),
        (run.parent / "rewards.jsonl", "{"),
        (
            run.parent / "rewards.jsonl",
            '{"id": "a", "tags": [0, 1], "n": [2, 2], "sum": [1], "truncated": [0, 0], "model": "m"}\n',
        ),
    ):
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        with pytest.raises(UserError, match=path.name) as error:
            round_row(0, run.parent)
        assert "\n" not in str(error.value)
        path.unlink() if before is None else path.write_text(before)


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_policies_and_rewards_of_two_rounds(tmp_path, field):
    run, marks = tmp_path / "round_000" / "run", {"model": "m", "prompt": "a" * 16}
    run.mkdir(parents=True)
    (run / "finished.json").write_text('{"iteration": 1, "reason": "done"}')
    reward = {"id": "a", "tags": [0, 1], "n": [2, 2], "sum": [1, 0], "truncated": [0, 0]} | marks
    policy = {"iteration": 0, "split": "train", "id": "a", "policy": [0.5, 0.5], "mass": 0.5} | marks
    (run.parent / "rewards.jsonl").write_text(json.dumps(reward) + "\n")
    (run / "policy.jsonl").write_text(json.dumps(policy) + "\n")
    assert round_row(0, run.parent).reward_before == 0.25
    (run / "policy.jsonl").write_text(json.dumps(policy | {field: "0" * 16}) + "\n")
    with pytest.raises(
        UserError, match=rf"policy.jsonl: id 'a' is of {field} 0000.*rewards.jsonl of .*: not of one round"
    ):
        round_row(0, run.parent)
