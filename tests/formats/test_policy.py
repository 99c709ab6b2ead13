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
