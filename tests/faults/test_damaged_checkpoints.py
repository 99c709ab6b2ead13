"""No damage to a checkpoint passes in silence: each is refused in one line that names the folder."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.checkpoints import train_and_save
from tests.helpers.damage import try_damages
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, make_rows, write_rows

DAMAGES = 250
ALWAYS = range(0, DAMAGES, 6)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return BASE | {
        "data_path": [write_rows(folder / "train.jsonl", make_rows())],
        "data_cache_path": str(folder / "cache"),
        "make_vocab_size_divisible_by": 8,
    }


@pytest.fixture(scope="module")
def saved(values, tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(1, train_and_save, values, str(run), 2)
    return run


def assert_all_refused(saved, values, tmp_path, numbers):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (outcomes,) = run_ranks(1, try_damages, values, str(run), 2, list(numbers))
    wrong = [(done, outcome) for done, outcome in outcomes if not outcome.startswith("refused: ")]
    assert wrong == []
    for _, outcome in outcomes:
        assert "\n" not in outcome and str(run / "iter_0000002") in outcome, outcome


def test_some_damages(saved, values, tmp_path):
    assert_all_refused(saved, values, tmp_path, ALWAYS)


@pytest.mark.slow
def test_every_damage(saved, values, tmp_path):
    assert_all_refused(saved, values, tmp_path, [i for i in range(DAMAGES) if i not in ALWAYS])
