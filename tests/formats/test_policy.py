"""policy.jsonl: damaged lines, and a file cut off by a kill."""

from __future__ import annotations

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.policy import read_policy
from tests.helpers.policy_evaluations import policy_rows, write_lines

GOOD = policy_rows()[0]


@pytest.mark.parametrize(
    "change",
    [{"iteration": -1}, {"iteration": None}, {"split": "test"}, {"id": 3}, {"policy": []}, {"policy": [1.5, -0.5]},
     {"policy": [0.5, 0.4]}, {"policy": [0.5, "x"]}, {"policy": None}, {"mass": 2}, {"mass": None},
     {"policy": [0.2, 0.3, 0.5]}, {"policy": [float("nan"), 1.0]}],
)  # fmt: skip
def test_damaged_policies(tmp_path, change):
    path = write_lines(tmp_path / "policy.jsonl", [GOOD, {**GOOD, **change}, GOOD])
    with pytest.raises(UserError) as error:
        read_policy(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_a_policy_cut_off_by_a_kill(tmp_path):
    path = write_lines(tmp_path / "policy.jsonl", [GOOD])
    whole = path.read_bytes()
    for cut in (1, 10, 40):
        path.write_bytes(whole + whole[:cut])
        assert len(read_policy(path)["eval"][0]) == 1
    path.write_bytes(whole[:-5] + b"\n" + whole)
    with pytest.raises(UserError, match=r"policy.jsonl:1: not valid JSON"):
        read_policy(path)
    path.write_bytes(whole + whole.replace(b"0.5, 0.5", b"0.1, 0.9"))  # written again: the later one counts
    assert read_policy(path)["eval"][0]["a"].policy_N.tolist() == [0.1, 0.9]


def test_lines_of_two_runs(tmp_path):
    """Lines of earlier versions, which name no model, may stand before those of the run that goes on."""
    older = {name: GOOD[name] for name in GOOD if name not in ("prompt", "model")}
    path = write_lines(tmp_path / "policy.jsonl", [older, GOOD, {**GOOD, "id": "b", "model": "other"}])
    with pytest.raises(
        UserError, match=r"policy.jsonl:3: of a run that began with model other, other lines with oldold"
    ):
        read_policy(path)
    rows = read_policy(write_lines(path, [{**older, "id": "b"}, GOOD]))["eval"][0]
    assert [(row.model, row.prompt) for row in rows.values()] == [(None, None), (GOOD["model"], GOOD["prompt"])]
