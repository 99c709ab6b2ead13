"""A run that goes on says what is different, keeps earlier configurations, and ends behind its checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.bad_input import complaint, contents
from tests.helpers.distributed import run_ranks
from tests.helpers.starts import data_file, metrics_of, start_again, starts

COSINE = {"lr": 1e-3, "lr_warmup_iters": 1, "train_iters": 4, "save_interval": 2}


def tell(folder):
    """(status, stdout, stderr) of each start, and the files of the run before and after those that are refused."""
    folder = Path(folder)
    run, epochs = folder / "run", folder / "epochs"
    told = starts(
        folder,
        {
            "first": COSINE | {"save": run},
            "by epochs": {"train_iters": None, "train_epochs": 2, "save": epochs, "max_tokens_per_microbatch": 128,
                          "micro_batch_size": None},
        },
    )  # fmt: skip
    before = contents(run), contents(epochs)
    told["shorter"] = start_again(run / "config.yaml", load=run, train_iters=2)
    told["fewer epochs"] = start_again(epochs / "config.yaml", load=epochs, train_epochs=1)
    told["unharmed"] = (contents(run), contents(epochs)) == before
    told["as long"] = start_again(run / "config.yaml", load=run)
    told["as many epochs"] = start_again(epochs / "config.yaml", load=epochs)
    told["unchanged but longer"] = start_again(run / "config.yaml", load=run, train_iters=6, lr_decay_iters=4)
    told["not yet"] = start_again(run / "config.yaml", load=run, lr=5e-3)
    told["changed"] = start_again(run / "config.yaml", load=run, **changes(folder))
    told["more epochs"] = start_again(epochs / "config.yaml", load=epochs, train_epochs=3)
    return told


def changes(folder):
    return {"lr": 5e-3, "matching": "random", "clip_grad": 0.5, "loss_normalization": "sequence", "train_iters": 8,
            "matching_tokens": 5, "lr_decay_iters": 8, "save": folder / "run"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changes")
    data_file(folder / "train.jsonl", [("prompt", f"{i}?", ["one", "two"]) for i in range(6)])
    return folder


@pytest.fixture(scope="module")
def told(folder):
    (outcome,) = run_ranks(1, tell, str(folder), timeout=300)
    return outcome


def said(told, name):
    status, out, err = told[name]
    assert status == 0, (name, out, err)
    return out


def test_a_start_or_a_resume_with_the_same_settings_says_nothing(told):
    for name in ("first", "by epochs", "as long", "as many epochs"):
        assert "->" not in said(told, name) and "changed" not in said(told, name)


def test_every_setting_that_changed_is_said(told, folder):
    line = re.search(r"^changed since step 6 .*$", said(told, "changed"), re.M)
    assert line, told["changed"]
    for change in (
        "lr 0.001 -> 0.005",
        "matching optimal -> random",
        "clip_grad 1.0 -> 0.5",
        "loss_normalization token -> sequence",
        "train_iters 6 -> 8",
        "matching_tokens 4 -> 5",
    ):
        assert f"--{change.replace('_', '-')}" in line[0].replace("_", "-"), change
    assert line[0].count("->") == 7
    longer = said(told, "unchanged but longer")
    assert "--train-iters 4 -> 6" in longer and "learning rate of step" not in longer  # it would be the same


def test_a_jump_of_the_learning_rate_is_said_with_its_step(told, folder):
    """As the schedules have it: the old one is at its end, the new one is not."""
    line = re.search(r"^learning rate of step 7: ([-+.e\d]+) -> ([-+.e\d]+)", said(told, "changed"), re.M)
    assert line and float(line[1]) == 0.0
    rates = {row["iteration"]: row["lr"] for row in metrics_of(folder / "run")}
    assert float(line[2]) == pytest.approx(rates[7], rel=1e-3) and rates[7] > 5e-4


def test_what_counts_is_the_start_that_trained_the_checkpoint(told):
    """A start that came to nothing has said what it changed; the next one says it again."""
    assert "--lr 0.001 -> 0.005" in said(told, "not yet")
    assert "--lr 0.001 -> 0.005" in said(told, "changed")


def test_an_epoch_more_moves_the_learning_rate(told):
    out = said(told, "more epochs")
    assert "--train-epochs 2 -> 3" in out and re.search(r"^learning rate of step 4: 0\S* -> \d", out, re.M)


def test_earlier_configurations_are_kept(told, folder):
    kept = sorted((folder / "run" / "configs").iterdir())
    assert [path.name for path in kept] == [
        "0001_from_step_0000000.yaml",
        "0002_from_step_0000004.yaml",
        "0003_from_step_0000004.yaml",
        "0004_from_step_0000006.yaml",
        "0005_from_step_0000006.yaml",
    ]
    settings = [yaml.safe_load(path.read_text()) for path in kept]
    assert [s["lr"] for s in settings] == [1e-3, 1e-3, 1e-3, 5e-3, 5e-3]
    assert kept[-1].read_bytes() == (folder / "run" / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    ("name", "flag", "step"), [("shorter", "--train-iters 2", "step 4"), ("fewer epochs", "--train-epochs 1", "")]
)
def test_a_run_does_not_end_before_its_checkpoint(told, name, flag, step):
    line = complaint(told[name])
    assert flag in line and step in line
    assert told["unharmed"]


def test_a_run_that_is_done_says_that_no_step_is_left(told):
    assert "finished at step 4 of 4" in said(told, "as long") and "no step left" in said(told, "as long")
    assert "finished at step 3 of 3" in said(told, "as many epochs")
