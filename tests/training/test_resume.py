"""Killed anywhere and resumed, a run ends as if nothing had happened: the logs agree byte for byte apart from times."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.topology import initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.processes import finish, ranks_of_program, start_program, wait_for_steps
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

start = functools.partial(start_program, "pretrain_ssft.py")
ranks_of = functools.partial(ranks_of_program, "pretrain_ssft.py")

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return {
        "data_path": write_rows(folder / "train.jsonl", make_rows()),
        "data_cache_path": str(folder / "cache"),
    }


LAYOUTS = {
    "one-process": (1, {}),
    "tp2-distributed-bf16": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True, "bf16": True},
    ),
    "padded-approximate": (
        1,
        {
            "sequence_layout": "padded",
            "matching_interval": 2,
            "matching_first_tokens": 2,
            "matching_certainty": 0.05,
            "regret_interval": 3,
        },
    ),
    "pp2-random": (2, {"pipeline_model_parallel_size": 2, "matching": "random", "log_matching_interval": 2}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, data, tmp_path_factory):
    """(ranks, flags, logs of the uninterrupted run)."""
    ranks, overrides = LAYOUTS[request.param]
    values = BASE | data | {"train_iters": STEPS, "save_interval": 4} | overrides
    run = tmp_path_factory.mktemp("whole") / "run"
    status, output = finish(start(flags(values | {"save": run}), ranks))
    assert status == 0, output
    return ranks, values, logs(run)


@pytest.mark.slow
def test_sigkill_after_a_checkpoint(layout, tmp_path):
    ranks, values, expected = layout
    run = tmp_path / "run"
    process = start(flags(values | {"save": run}), ranks)
    wait_for_steps(process, run, 6)
    for pid in [*ranks_of(process, ranks), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert len((run / "metrics.jsonl").read_text().splitlines()) < STEPS
    assert (run / "iter_0000004").is_dir()
    status, output = finish(start(["--config", str(run / "config.yaml"), "--load", str(run)], ranks))
    assert status == 0, output
    assert "steps 5 to 12" in output or "steps 9 to 12" in output
    assert logs(run) == expected


@pytest.mark.slow
def test_sigterm_stops_cleanly(layout, tmp_path):
    ranks, values, expected = layout
    run = tmp_path / "run"
    process = start(flags(values | {"save": run}), ranks)
    wait_for_steps(process, run, 5)
    for pid in ranks_of(process, ranks):  # as SLURM does: to every task, which need not all be at the same step
        os.kill(pid, signal.SIGTERM)
    status, output = finish(process)
    assert status == 0, output
    assert "stopped by SIGTERM at step" in output
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 5 <= done < STEPS
    assert (run / "latest_checkpointed_iteration.txt").read_text() == str(done)
    status, output = finish(start(["--config", str(run / "config.yaml"), "--load", str(run)], ranks))
    assert status == 0, output
    assert logs(run) == expected


@pytest.mark.slow
def test_torn_files_do_not_stop_a_resume(data, tmp_path):
    """A torn tracker, a torn last log line and a half-written checkpoint, as a crash of the machine leaves them."""
    values = BASE | data | {"train_iters": 8, "save_interval": 4}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(start(flags(values | {"save": whole})))[0] == 0
    assert finish(start(flags(values | {"save": run})))[0] == 0
    (run / "latest_checkpointed_iteration.txt").write_text("")
    partial = run / "iter_0000008"
    partial.rename(run / ".iter_0000008.partial")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 9, "lo')
    status, output = finish(start(["--config", str(run / "config.yaml"), "--load", str(run)]))
    assert status == 0, output
    assert logs(run) == logs(whole)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert not (run / ".iter_0000008.partial").exists()


@pytest.mark.slow
def test_a_finished_run_is_left_alone(data, tmp_path):
    values = BASE | data | {"train_iters": 3, "save": tmp_path / "run"}
    assert finish(start(flags(values)))[0] == 0
    before = logs(tmp_path / "run")
    status, output = finish(start([*flags(values), "--load", str(tmp_path / "run")]))
    assert status == 0, output
    assert logs(tmp_path / "run") == before


def final_state(values, steps_until, overrides):
    """Train to a step, save, and count what a resumed trainer with other settings plans to do."""
    trainer = Trainer(build_config(values, SSFTConfig), initialize_topology(build_config(values, SSFTConfig).run))
    for _ in range(steps_until):
        trainer.train_step()
    run = Path(values["save"])
    save_checkpoint(trainer.engine, run, trainer.iteration, trainer.state())
    resumed = Trainer(build_config(values | {"load": str(run)} | overrides, SSFTConfig), trainer.topology)
    steps, visits = resumed.train_iters - resumed.iteration, []
    for _ in range(steps):
        visits += [visit.index for visit in resumed.objective.sets.next_batch().visits]
    return resumed.iteration, steps, visits, resumed.objective.sets.queue.next_batch()


@pytest.mark.parametrize("size", [6, 12, 24])
def test_epochs_end_where_they_should_with_another_batch_size(data, tmp_path, size):
    """The steps of a resumed run are counted from what is left of the data, not from what its beginning took."""
    values = BASE | data | {"train_iters": None, "train_epochs": 1, "save": str(tmp_path / "run")}
    values = {k: [v] if k == "data_path" else v for k, v in values.items() if v is not None}
    ((iteration, steps, visits, after),) = run_ranks(1, final_state, values, 3, {"global_batch_size": size})
    assert iteration == 3
    assert after is None
    assert len(visits) == len(set(visits))
    traces = [len(row["traces"]) for row in make_rows()]
    left = sum(traces) - 3 * BASE["global_batch_size"]
    assert sum(traces[i] for i in visits) == left
    assert left / size <= steps <= left / size + 2


@pytest.mark.slow
def test_a_finetuned_run_resumes(data, tmp_path):
    """config.yaml tells what the run is, not how it was started."""
    base, run, whole = tmp_path / "base", tmp_path / "run", tmp_path / "whole"
    assert finish(start(flags(BASE | data | {"train_iters": 2, "save": base})))[0] == 0
    tuned = flags(BASE | data | {"train_iters": 6, "load": base, "finetune": True, "save_interval": 2})
    assert finish(start([*tuned, "--save", str(whole)]))[0] == 0
    status, output = finish(start([*tuned, "--save", str(run), "--train-iters", "4", "--lr-decay-iters", "6"]))
    assert status == 0, output
    again = ["--config", str(run / "config.yaml"), "--load", str(run), "--train-iters", "6"]
    status, output = finish(start(again))
    assert status == 0, output
    assert "steps 5 to 6" in output
    assert logs(run) == logs(whole)
