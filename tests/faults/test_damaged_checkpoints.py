"""No damage to a checkpoint passes in silence: each is refused in one line that names the folder."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.helpers.campaigns import cases, tell
from tests.helpers.checkpoints import train_and_save, values_in
from tests.helpers.damage import try_damages
from tests.helpers.distributed import run_ranks

DAMAGES = 250
TRIED = cases(whole=DAMAGES, part=40)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return values_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(values, tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(1, train_and_save, values, str(run), 2)
    return run


def test_every_damage_is_refused(saved, values, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    numbers = random.Random(0).sample(range(DAMAGES), TRIED)
    (outcomes,) = run_ranks(1, try_damages, values, str(run), 2, sorted(numbers))
    wrong = [(done, outcome) for done, outcome in outcomes if not outcome.startswith("refused: ")]
    assert len(outcomes) == TRIED and wrong == []
    for _, outcome in outcomes:
        assert "\n" not in outcome and str(run / "iter_0000002") in outcome, outcome
    tell("damages of a checkpoint's files", TRIED, "all refused in one line")
