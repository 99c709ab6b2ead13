"""Policy learning: what the parallel layout must not change."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.policy_cases import (
    CASES,
    LAYOUTS,
    PADDED,
    in_turn,
    values_of,
)
from tests.helpers.policy_runs import (
    gradients_of,
    run_and_tell,
)
from tests.helpers.training_runs import assemble


@pytest.fixture(scope="module")
def alone(models, inputs, tmp_path_factory):
    """What one process tells of every case, from rows."""
    folder = tmp_path_factory.mktemp("alone")
    rows = PADDED | {"micro_batch_size": 4}
    cases = [values_of(case, models, inputs, folder / name, **rows) for name, case in CASES.items()]
    (told,) = run_ranks(1, run_and_tell, cases)
    return dict(zip(CASES, told))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(alone, models, inputs, tmp_path, layout):
    ranks, variants = LAYOUTS[layout]
    runs = in_turn(CASES, variants, list(LAYOUTS).index(layout))
    cases = [values_of(CASES[c], models, inputs, tmp_path / str(i), **o) for i, (c, o) in enumerate(runs)]
    results = run_ranks(ranks, run_and_tell, cases, timeout=300)
    for (case, overrides), *told in zip(runs, *results):
        assert_same(alone[case], told, f"{case}, {layout}, {overrides}")


def assert_same(expected, told, where):
    for a, *rows in zip(expected["rows"], *(t["rows"] for t in told), strict=True):
        for row in rows:
            assert numbers(row) == numbers(rows[0]), where  # the same on all ranks
        got, wanted = numbers(rows[0]), numbers(a)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            rel = 1e-4 if name == "grad_norm" else 2e-5
            assert got[name] == pytest.approx(value, rel=rel, abs=2e-6), (where, name, a["iteration"])
    if expected["fork"] is not None:
        np.testing.assert_allclose(told[0]["fork"], expected["fork"], rtol=2e-4, atol=2e-4, err_msg=where)
    if gradients_of(told) is not None:
        gradients_a, gradients_b = assemble(gradients_of([expected])), assemble(gradients_of(told))
        assert gradients_a.keys() == gradients_b.keys()
        largest = max(np.linalg.norm(g) for g in gradients_a.values())
        assert largest > 1e-3
        for name, a in gradients_a.items():
            error = np.linalg.norm(gradients_b[name] - a)
            assert error <= 1e-5 * max(np.linalg.norm(a), 1e-2 * largest), (where, name, error / np.linalg.norm(a))
    weights_a, weights_b = assemble([expected]), assemble(told)
    assert weights_a.keys() == weights_b.keys()
    for name, value in weights_a.items():
        np.testing.assert_allclose(weights_b[name], value, rtol=1e-4, atol=1e-4, err_msg=f"{where}: {name}")


PLANNED = ("seconds", "pad_sequences", "makespan_over_bound", "training_flops", "scoring_flops")
"""What the plan decides."""


def numbers(row):
    return {name: v for name, v in row.items() if name not in PLANNED and not isinstance(v, str)}
