"""Checkpoints that `train` refuses or must not harm, and numbers that go wrong while it trains."""

from __future__ import annotations

import re

import pytest

from tests.helpers.bad_input import complaint, contents, flags, row, save_poisoned, start, train_poisoned, write_rows
from tests.helpers.distributed import run_ranks

# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with train.jsonl and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "train.jsonl")
    status, _, err = run_ranks(1, start, flags(folder, save=folder / "run", save_interval=1))[0]
    assert status == 0, err
    return folder


def refused_on(run, **changes):
    """The complaint about a start with other flags, none of which may touch the run."""
    before = contents(run / "run")
    line = complaint(run_ranks(1, start, flags(run, **changes))[0])
    assert contents(run / "run") == before
    return line


def test_save_into_another_run(run):
    line = refused_on(run, save=run / "run")
    assert line.startswith(f"--save {run}/run: ") and "iter_0000002" in line and "--load" in line


def test_save_into_another_run_while_loading_a_third(run, tmp_path):
    (tmp_path / "iter_0000001").mkdir()
    assert refused_on(run, save=run / "run", load=tmp_path).startswith(f"--save {run}/run: ")


@pytest.mark.parametrize(
    ("changes", "inside"),
    [
        ({"hidden_size": 32}, "hidden_size 16"),
        ({"num_layers": 4}, "num_layers 2"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"num_forking_tokens": 5}, "forking tokens"),
        ({"forking_token_template": "<t{i}>"}, "forking tokens"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer"),
        ({"bf16": True}, "--bf16"),
        ({"seq_length": 32}, "data"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_load_with_other_settings(run, changes, inside):
    line = refused_on(run, load=run / "run", save=run / "run", **changes)
    assert line.startswith(f"--load {run}/run: ") and inside in line


def test_load_with_other_data(run):
    other = write_rows(run / "other.jsonl", row(2, question="what else?"))
    line = refused_on(run, load=run / "run", save=run / "run", data_path=other)
    assert line.startswith(f"--load {run}/run: ") and "data" in line and "--finetune" in line


def test_finetune_does_not_untie(run):
    line = refused_on(run, load=run / "run", finetune=True, untie_embeddings_and_output_weights=True)
    assert line.startswith(f"--load {run}/run: ") and "untie_embeddings_and_output_weights" in line


def test_load_with_another_seed(run):
    line = refused_on(run, load=run / "run", save=run / "run", seed=2)
    assert "--seed 1" in line and "--seed 2" in line


def test_nan_in_a_checkpoint(run, tmp_path):
    run_ranks(1, save_poisoned, flags(run), str(tmp_path))
    before = contents(tmp_path)
    for more in ({"save": tmp_path}, {"finetune": True}):
        line = complaint(run_ranks(1, start, flags(run, load=tmp_path, **more))[0])
        assert line.startswith(f"{tmp_path}/iter_0000001: ")
        assert "NaN" in line and "layers.0.mlp.linear_fc1.weight" in line
    assert contents(tmp_path) == before


# -- numbers that go wrong while training ----------------------------------------------------------------------------


@pytest.mark.parametrize(("matching", "inside"), [("optimal", "cost"), ("fixed", "loss"), ("single", "loss")])
def test_nan_while_training(run, tmp_path, matching, inside):
    scored = {} if matching != "single" else {"matching_tokens": None}
    result = run_ranks(1, train_poisoned, flags(run, save=tmp_path / "new", matching=matching, **scored))[0]
    line = complaint(result)
    place = re.escape(f"{run}/train.jsonl:") + r"[1-6]"
    # A cost is one question's and leads the line; a loss is that of a microbatch, whose questions are all named.
    assert re.match(f"{place}: ", line) or (inside == "loss" and re.search(f"{place}, {place}", line)), line
    assert inside in line and ("finite" in line or "nan" in line)
    assert not list((tmp_path / "new").glob("iter_*"))
    assert (tmp_path / "new" / "metrics.jsonl").read_bytes() == b""


def test_nan_after_a_resume_leaves_the_checkpoint(run, tmp_path):
    """The logs are cut back to the checkpoint; the checkpoint itself stays loadable."""
    assert run_ranks(1, start, flags(run, save=tmp_path))[0][0] == 0
    before = {path: text for path, text in contents(tmp_path).items() if "iter_0000002" in path.parts}
    complaint(run_ranks(1, train_poisoned, flags(run, save=tmp_path, load=tmp_path, train_iters=4))[0])
    assert {path: text for path, text in contents(tmp_path).items() if "iter_0000002" in path.parts} == before
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]
    assert run_ranks(1, start, flags(run, save=tmp_path, load=tmp_path, train_iters=3))[0][0] == 0
