"""--dry-run meets nobody: one process describes the job, wherever it is started."""

from __future__ import annotations

import pytest

from megatron_ssft.cli import train
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows

UNREACHABLE = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}
TASK = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
STARTS = {
    "a batch shell": (BATCH, "ranks: 2, data-parallel 1"),
    "a batch shell that has prepared a step": (BATCH | UNREACHABLE, "ranks: 2, data-parallel 1"),
    "a task without a place to meet": (TASK, "ranks: 8, data-parallel 4"),
    "a task": (TASK | UNREACHABLE, "ranks: 8, data-parallel 4"),
    "torchrun": (TORCHRUN | UNREACHABLE, "ranks: 8, data-parallel 4"),
}


@pytest.fixture
def described(tmp_path, monkeypatch):
    """What a dry run prints under these variables, with further flags."""

    def run(environment, **changes):
        for name in {**TASK, **TORCHRUN, **UNREACHABLE}:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        data = write_rows(tmp_path / "train.jsonl", make_rows())
        values = BASE | {"data_path": data, "tensor_model_parallel_size": 2, **changes}
        train.main([*flags(values), "--dry-run"])

    return run


@pytest.mark.parametrize("name", STARTS)
def test_needs_no_rendezvous(name, described, capsys):
    environment, expected = STARTS[name]
    described(environment)
    assert expected in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "environment", [TASK | {"SLURM_PROCID": "5"}, TORCHRUN | UNREACHABLE | {"RANK": "3"}], ids=["task", "torchrun"]
)
def test_other_ranks_do_not_repeat_it(environment, described, capsys, monkeypatch):
    monkeypatch.setattr("megatron_ssft.training.describe.build_vocabulary", lambda *_: pytest.fail("reads its input"))
    described(environment)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "package"),
    [({"wandb_project": "ssft"}, "wandb"), ({"transformer_impl": "transformer_engine"}, "transformer_engine")],
)
def test_names_the_packages_that_are_missing(changes, package, described, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    described({}, **changes)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing on this machine: ")]
    assert len(lines) == 1 and f"--{next(iter(changes)).replace('_', '-')}" in lines[0]


def test_says_what_is_left_to_the_device(described, capsys):
    """It is known only where the job runs, which may be elsewhere."""
    described({}, use_distributed_optimizer=True)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("left to the device: "))
    assert line.startswith("left to the device: on GPUs overlap-grad-reduce, overlap-param-gather, bias-swiglu-fusion")
    assert line.endswith("on the CPU nothing")
