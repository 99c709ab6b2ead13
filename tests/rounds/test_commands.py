"""Command lines of the stages: the launcher, and flags that the programs would refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.rounds.commands import Commands, Options, Tools
from tests.helpers.online_loop import checked


def test_ranks_are_those_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text("tensor_model_parallel_size: 2\npipeline_model_parallel_size: 3\n")
    base = {"data": Path("q"), "save": Path("w"), "rounds": 1, "train_iters": 1, "lr": "1", "verifier": "exact"}
    tools = Tools.of_project()

    def launcher(**values):
        return Commands(Options(load=tmp_path, **base, **values), tools).launcher()

    assert launcher()[-2:] == ["--nproc-per-node", "6"] and "torch.distributed.run" in launcher()
    assert launcher(nproc=4)[-1] == "4" and launcher(nproc=1) == [sys.executable]
    assert launcher(launcher="srun --ntasks=16 python") == ["srun", "--ntasks=16", "python"]


BASE = ["--save", "work", "--rounds", "2", "--train-iters", "3", "--lr", "0.1", "--verifier", "exact"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--generate-args", "--temperatur 1"], "--generate-args: unrecognized arguments: --temperatur 1"),
        (["--score-args", "--timeout soon"], "--score-args: argument --timeout: invalid float value"),
        (["--train-args", "--trainable most"], "--train-args: --trainable most: "),
        (["--train-args", "--bogus 1"], "--train-args: unrecognized arguments: --bogus 1"),
        (["--lr", "much"], "--train-args: argument --lr: invalid float value"),
    ],
)
def test_flags_of_later_stages_are_checked_before_the_first(program, place, flags, text):
    with pytest.raises(UserError) as error:
        checked(program, place, "--load", str(place.folder / "start"), "--data", str(place.data), *BASE, *flags)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_flags_that_exist_pass(program, place):
    flags = ["--load", str(place.folder / "start"), "--data", str(place.data), "--eval-data", str(place.data), *BASE]
    flags += ["--generate-args", "--temperature 1 --top-p 1", "--score-args=--workers 1"]
    for stage in ("gfpo-exact --trainable tag-rows", "gfpo-sampled --policy-epochs 2", "gfpo-exact --kl-coef 0.1"):
        checked(program, place, *flags, "--train-args", f"--objective {stage}")
