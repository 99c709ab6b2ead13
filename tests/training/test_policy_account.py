"""metrics.jsonl of policy learning has the share of samples that ended at their token limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.policy_cases import CASES, PADDED, values_of
from tests.helpers.policy_files import edit_lines
from tests.helpers.policy_runs import SAMPLES, TAGS, run_and_tell


def with_cut_samples(inputs, folder):
    """The inputs with sample 0 under tag 1 of every question cut."""
    shutil.copytree(Path(inputs["data"]).parent, folder)

    def cut(row):
        return row | ({"finish_reason": "length"} if (row["tag"], row["sample"]) == (1, 0) else {})

    edit_lines(folder / "R.jsonl", cut)
    edit_lines(folder / "S.jsonl", cut)
    truncated = [int(tag == 1) for tag in range(TAGS)]
    edit_lines(folder / "REWARDS.jsonl", lambda row: row | {"truncated": truncated})
    return {name: str(folder / Path(path).name) for name, path in inputs.items()}


@pytest.mark.slow
def test_every_step_has_the_share(models, inputs, tmp_path):
    files = with_cut_samples(inputs, tmp_path / "inputs")
    cases = {case[1]["objective"]: case for case in reversed(CASES.values())}
    assert set(cases) == {"gfpo-exact", "gfpo-sampled", "grpo"}
    rows = PADDED | {"micro_batch_size": 4, "train_iters": 2}
    values = [values_of(case, models, files, tmp_path / name, **rows) for name, case in cases.items()]
    (told,) = run_ranks(1, run_and_tell, values)
    for outcome in told:
        assert [row["truncated_share"] for row in outcome["rows"]] == pytest.approx([1 / (TAGS * SAMPLES)] * 2)
        json.dumps(outcome["rows"])
