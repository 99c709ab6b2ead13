"""Rewards files: what they mean, and one line for whatever is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import to_line
from megatron_ssft.formats.rewards import count_rewards, is_unjudged, read_rewards, read_source, write_rewards
from megatron_ssft.formats.rollouts import ScoredRollout
from tests.helpers.scored_rows import scored

ROW = {
    "id": "q0",
    "tags": [0, 1, 2],
    "n": [2, 4, 1],
    "sum": [0, 3, 1],
    "truncated": [1, 0, 0],
    "verifier": "exact",
    "model": "abc",
    "rollouts": "R.jsonl",
    "scores": "../S.jsonl",
}


def row(number=0, **changes):
    return {k: v for k, v in (ROW | {"id": f"q{number}"} | changes).items() if v is not ...}


def write(path, rows):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def refusal(path, num_tags=3):
    with pytest.raises(UserError) as caught:
        read_rewards(path, num_tags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_counts_stand_under_their_tags(tmp_path):
    table = read_rewards(write(tmp_path / "W", [row(), row(1, tags=[2, 0, 1])]), 3)
    np.testing.assert_array_equal(table.rows["q0"].n_N, [2, 4, 1])
    np.testing.assert_array_equal(table.rows["q1"].n_N, [4, 1, 2])
    np.testing.assert_array_equal(table.rows["q1"].sum_N, [3, 1, 0])
    np.testing.assert_array_equal(table.rows["q1"].truncated_N, [0, 0, 1])
    assert table.rows["q1"].line == 2 and table.model == "abc"


def test_rewards_say_which_prompt_they_were_measured_with(tmp_path):
    """As their samples do; not where one sample of a question does not."""
    origin = {"model": "m", "tokenizer": "t", "sampling": {"mode": "each"}, "seed": 1, "finish_reason": "stop"}
    judged = {"correct": True, "answer": "1", "verdict": "correct", "verifier": "exact", "num_tokens": 1}

    def sample(id, tag, prompt):
        return ScoredRollout(id=id, tag=tag, sample=0, prompt=prompt, truncated=False, **origin, **judged)

    scored = [sample("a", 0, "a" * 16), sample("a", 1, "a" * 16), sample("b", 0, "b" * 16), sample("b", 1, None)]
    write_rewards(tmp_path / "W", scored, tmp_path / "R", tmp_path / "S")
    rows = read_rewards(tmp_path / "W", 2).rows
    assert {id: row.prompt for id, row in rows.items()} == {"a": "a" * 16, "b": None}
    assert "prompt" not in json.loads((tmp_path / "W").read_text().splitlines()[1])


def test_partial_rewards_are_taken(tmp_path):
    table = read_rewards(write(tmp_path / "W", [row(sum=[0.5, 2.25, 1])]), 3)
    np.testing.assert_array_equal(table.rows["q0"].sum_N, [0.5, 2.25, 1])


def test_files_are_seen_from_the_folder_of_the_rewards(tmp_path):
    table = read_rewards(write(tmp_path / "W", [row()]), 3)
    assert table.rollouts == tmp_path / "R.jsonl" and table.scores == tmp_path / "../S.jsonl"
    table = read_rewards(write(tmp_path / "W", [row(rollouts=..., scores=None)]), 3)
    assert table.rollouts is None and table.scores is None


def test_source_is_read_whatever_the_counts_are(tmp_path):
    source = read_source(write(tmp_path / "W", [b"  ", row(n=[0, 0], tags=[7])]))
    assert (source.model, source.rollouts) == ("abc", tmp_path / "R.jsonl")


WRONG = {
    "no JSON": (b'{"id": ', "not valid JSON"),
    "no object": ([1], "JSON object"),
    "no id": (row(id=...), "'id' is missing"),
    "number for id": (row(id=3), "'id'"),
    "no model": (row(model=...), "'model'"),
    "rollouts no path": (row(1, rollouts=3), "'rollouts'"),
    "no tags": (row(1, tags=...), "'tags'"),
    "tag twice": (row(1, tags=[0, 1, 1]), "'tags'"),
    "tag true": (row(1, tags=[0, True, 2]), "'tags'"),
    "foreign tag": (row(1, tags=[0, 1, 3]), "tag 3 (0-based): the model has 3"),
    "n too short": (row(1, n=[2, 2]), "'n' must be 3 whole numbers"),
    "n not whole": (row(1, n=[2, 4.5, 1]), "'n' must be a list of whole numbers from 0, one per tag"),
    "n negative": (row(1, n=[2, 4, -1]), "'n' must be"),
    "sum negative": (row(1, sum=[-1, 3, 1]), "'sum' must be"),
    "sum missing": (row(1, sum=...), "'sum'"),
    "sum NaN": (b'{"id": "q1", "tags": [0], "n": [1], "sum": [NaN], "truncated": [0], "model": "abc", '
                b'"rollouts": "R.jsonl", "scores": "../S.jsonl"}', "'sum'"),
    "sum > n": (row(1, sum=[0, 5, 1]), "cannot be greater than 'n'"),
    "truncated > n": (row(1, truncated=[3, 0, 0]), "cannot be greater than 'n'"),
    "n = 0": (row(1, n=[2, 0, 1], sum=[0, 0, 1]), "no samples under tag 1"),
    "tag left out": (row(1, tags=[0, 2], n=[2, 1], sum=[0, 1], truncated=[0, 0]), "no samples under tag 1"),
    "duplicate": (row(0), "'q0' is already on line 1"),
    "other model": (row(1, model="xyz"), "another model"),
    "other rollouts": (row(1, rollouts="R2.jsonl"), "other files"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_row(tmp_path, name):
    second, inside = WRONG[name]
    path = write(tmp_path / "W.jsonl", [row(), second, row(2)])
    line = refusal(path)
    assert line.startswith(f"{path}:2: ") and inside in line and "more rows" not in line


def test_many_wrong_rows_are_one_line_with_their_number(tmp_path):
    path = write(tmp_path / "W.jsonl", [row(i) for i in range(40)])
    line = refusal(path, num_tags=2)
    assert line.startswith(f"{path}:1: tag 2 ") and line.endswith("(39 more rows are wrong)")


def test_torn_last_line(tmp_path):
    path = write(tmp_path / "W.jsonl", [row(), row(1)])
    path.write_bytes(path.read_bytes()[:-20])
    line = refusal(path)
    assert line.startswith(f"{path}:2: the file ends within this row") and "megatron-ssft score" in line


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "W").write_bytes(content)
    assert refusal(tmp_path / "W").startswith(f"{tmp_path}/W:1: the file is empty")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["absent", "folder"])
def test_no_file(tmp_path, make):
    make(tmp_path / "W")
    assert refusal(tmp_path / "W").startswith(f"{tmp_path}/W: cannot read the rewards")


def test_samples_without_a_verdict():
    """The verifier's own failures are marked; a program that runs out of time is judged."""
    rows = [scored("a", tag, 0, None, gold="1", verifier=verifier, verdict=verdict)
            for tag, (verifier, verdict) in enumerate([("math", "timeout"), ("math", "memory"), ("math", "no answer"),
                                                       ("exact", "crash: verifier, exit status 1")])]  # fmt: skip
    assert [line.unjudged for line in count_rewards(rows)] == [[1, 1, 0, 1]]
    program = [scored("a", 0, 0, None, verifier="code", verdict=v) for v in ("timeout", "memory", "crash: ValueError")]
    assert not any(map(is_unjudged, program))
    assert "unjudged" not in to_line(count_rewards(program)[0])


@pytest.mark.parametrize("unjudged", [[1], [5, 5, 5], [-1, 0, 0], "1"])
def test_wrong_counts_of_samples_without_a_verdict_are_refused(tmp_path, unjudged):
    good = row(unjudged=[0, 1, 0])
    assert read_rewards(write(tmp_path / "W", [good]), 3).unjudged == 1
    with pytest.raises(UserError, match="unjudged"):
        read_rewards(write(tmp_path / "W", [row(unjudged=unjudged)]), 3)
