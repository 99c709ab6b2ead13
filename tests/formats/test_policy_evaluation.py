"""Damaged evaluations of a policy are one line."""

from __future__ import annotations

import json
import math

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.policy_evaluation import load_policy_evaluation
from tests.helpers.report_data import (
    make_policy_evaluation,
)

CHANGES = {
    "no rows": lambda r: r["rows"].clear(),
    "no key": lambda r: r.pop("differences"),
    "a row without a name": lambda r: r["rows"][0].pop("name"),
    "a value that is text": lambda r: r["rows"][2]["after"].update(value="1"),
    "a value that is nothing": lambda r: r["rows"][2]["after"].update(value=None),
    "a value without end": lambda r: r["rows"][2]["after"].update(value=math.inf),
    "an error of true": lambda r: r["rows"][2]["after"].update(stderr=True),
    "one size": lambda r: r["samples_per_tag"].update(before=[1]),
    "shares of other tags": lambda r: r["choices"][0]["groups"][0].update(share=[1.0]),
    "other groups": lambda r: r["choices"][0]["groups"].pop(),
    "a choice twice": lambda r: r["choices"].append(r["choices"][0]),
    "no all": lambda r: [c["groups"].pop(0) for c in r["choices"]],
    "a list": lambda r: r.update(fixed_tag=[]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_damaged_evaluation_is_one_line(tmp_path, case):
    folder = make_policy_evaluation(tmp_path / "eval")
    path = folder / "policy_evaluation.json"
    record = json.loads(path.read_text())
    load_policy_evaluation(folder)
    CHANGES[case](record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged or of another version") as error:
        load_policy_evaluation(folder)
    assert "\n" not in str(error.value)
