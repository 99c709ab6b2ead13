"""The heartbeat of real runs: however they end, a watchdog reads how."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megatron_ssft.config import ParallelConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.heartbeat import HEARTBEAT, judge, read_heartbeat
from megatron_ssft.parallel.watch.watch import Watch
from megatron_ssft.training import pulse as pulse_module
from megatron_ssft.training.folder_lease import FolderLease
from megatron_ssft.training.pulse import Pulse
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.fault_points import run_with_fault
from tests.helpers.processes import finish, start_program, wait_for_steps
from tests.helpers.struck_ranks import run_struck
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows


class Held:
    """A lease that another job may take."""

    is_lost = False


def pulse_in(folder, watch=None, lease=None):
    (folder / "something").touch()
    return Pulse(folder, watch or Watch(), ParallelConfig(), lease or Held())


def test_long_work_gives_signs_of_life(tmp_path, monkeypatch):
    """Without a step in between; progress is another thing."""
    monkeypatch.setattr(pulse_module, "BEAT_SECONDS", 0.1)
    watch = Watch()
    pulse = pulse_in(tmp_path, watch)
    with pulse.until_the_end(), watch.phase("tokenizing", slow=True):
        pulse.begin()
        first = read_heartbeat(tmp_path)
        time.sleep(0.5)
        later = read_heartbeat(tmp_path)
        watch.moved()
        time.sleep(0.3)
        moved = read_heartbeat(tmp_path)
        pulse.end(is_stopped=False)
        done = read_heartbeat(tmp_path)
    assert later.time > first.time and later.progressed_at == first.progressed_at
    assert moved.progressed_at > later.progressed_at and moved.phase == "tokenizing"
    assert moved.limit_seconds == 60 * ParallelConfig().slow_work_timeout_minutes
    assert (done.state, done.status) == ("done", 0)
    time.sleep(0.3)
    assert read_heartbeat(tmp_path) == done  # nothing after the end


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("x.jsonl:1: bad"), 2), (KeyError("bug"), 1), (OSError(28, "full"), 2)]
)
def test_error_that_ends_the_run(tmp_path, error, status):
    pulse = pulse_in(tmp_path)
    with pytest.raises(type(error)), pulse.until_the_end():
        pulse.begin()
        pulse.step(3, 9, float("nan"))
        raise error
    beat = read_heartbeat(tmp_path)
    assert (beat.state, beat.status, beat.iteration, beat.loss) == ("failed", status, 3, None)
    assert str(error) in beat.message


class Away:
    """A lease in a file system that is away for a moment."""

    @property
    def is_lost(self):
        raise OSError(116, "Stale file handle")


def test_a_file_system_that_is_away_for_a_moment_ends_nothing(tmp_path):
    lease = Held()
    pulse = pulse_in(tmp_path, lease=lease)
    with pulse.until_the_end():
        pulse.begin()
        pulse._lease = Away()
        pulse.step(1, 9, 0.5)
        assert read_heartbeat(tmp_path).iteration == 0
        pulse._lease = lease
        pulse.step(2, 9, 0.5)
        assert read_heartbeat(tmp_path).iteration == 2
        pulse.end(is_stopped=False)


def test_folder_of_another_job_is_left_alone(tmp_path):
    lease = Held()
    pulse = pulse_in(tmp_path, lease=lease)
    with pulse.until_the_end():
        pulse.begin()
        pulse.step(1, 9, 0.5)
        lease.is_lost = True
        pulse.step(2, 9, 0.5)
        pulse.end(is_stopped=False)
    assert read_heartbeat(tmp_path).iteration == 1


def test_other_ranks_write_nothing(tmp_path):
    pulse = Pulse(None, Watch(), ParallelConfig(), FolderLease(None, None))
    with pulse.until_the_end():
        pulse.begin()
        pulse.step(1, 2, 0.5)
        pulse.end(is_stopped=False)
    assert not list(tmp_path.iterdir())


# -- runs --------------------------------------------------------------------------------------------------------------


def words(folder, **changes):
    data = write_rows(folder / "train.jsonl", make_rows())
    return flags(BASE | {"data_path": data, "save": folder / "run", "train_iters": 3, "save_interval": 2} | changes)


def now(folder):
    beat = read_heartbeat(folder / "run")
    return beat, judge(beat, time.time())


def killed_at(command_words, folder, at):
    """Run until it is killed before its file operation number `at`; whether it was."""
    try:
        run_ranks(1, run_with_fault, "train", command_words, folder, 0, at)
    except RankFailure as failure:
        assert "exit code -9" in str(failure)
        return True
    return False


def test_valid_after_a_kill_at_any_of_its_operations(tmp_path):
    command = words(tmp_path)
    whole = tmp_path / "whole"
    ((status, _, err, done),) = run_ranks(1, run_with_fault, "train", command + ["--save", str(whole)], str(whole))
    assert status == 0, err
    assert now_state(whole) == "done"
    own = [at for at, name in enumerate(done) if "heartbeat" in name]
    assert len(own) >= 2 * 5  # the start, the steps, the end; each is written and renamed
    for case, at in enumerate((own[1], own[2], own[len(own) // 2], own[-1])):
        run = tmp_path / f"run {case}"
        assert killed_at(command + ["--save", str(run)], str(run), at)
        if at == own[1]:
            assert not (run / HEARTBEAT).exists()  # it was the first one
        else:
            assert now_state(run) == "failed"


def now_state(run):
    return judge(read_heartbeat(run), time.time()).state


def test_refused_start(tmp_path):
    """It leaves no folder that was not there, and what an earlier run says of its end."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / HEARTBEAT).write_text("of an earlier run")
    bad = write_rows(tmp_path / "bad.jsonl", [{"id": "q", "question": "1+1"}])
    for save in ("new", "kept"):
        command = words(tmp_path, data_path=bad, save=tmp_path / save)
        ((status, _, _, _),) = run_ranks(1, run_with_fault, "train", command, str(tmp_path))
        assert status == 2
    assert (tmp_path / "kept" / HEARTBEAT).read_text() == "of an earlier run"
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_stopped_run(tmp_path):
    process = start_program("pretrain_ssft.py", words(tmp_path, train_iters=100_000, lr_warmup_iters=0))
    wait_for_steps(process, tmp_path / "run", 2)
    beat, finding = now(tmp_path)
    assert finding.state == "alive" and beat.pid == process.pid and beat.iteration >= 1 and beat.train_iters == 100_000
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process)[0] == 0
    beat, finding = now(tmp_path)
    assert finding.state == "stopped" and beat.iteration >= 2


@pytest.mark.slow
def test_hung_run_is_stuck_and_a_lost_rank_is_told(tmp_path):
    """Rank 1 stands still in a step: for a while that is no fault, then the watch ends the job."""
    command = words(tmp_path, tensor_model_parallel_size=2, distributed_timeout_minutes=0.1)
    ended = run_struck(tmp_path, 2, command, "training", rank=1, number=0, nth=2)
    assert ended[0].status == 75
    beat, finding = now(tmp_path)
    assert (beat.state, beat.status, finding.state) == ("failed", 75, "failed")
    assert beat.iteration == 1 and "no progress for 6 s" in beat.message and "step 2, training" in beat.message


@pytest.mark.slow
def test_run_that_stands_still_alone(tmp_path):
    """Nobody watches a single rank but who reads the heartbeat."""
    from tests.helpers.distributed import _context, free_port, no_survivors
    from tests.helpers.struck_ranks import _run

    command = words(tmp_path, distributed_timeout_minutes=0.1)
    arguments = (0, 1, free_port(), str(tmp_path / "out"), command, ("training", 0, 2, str(tmp_path / "struck")))
    process = _context.Process(target=_run, args=arguments)
    process.start()
    with no_survivors([process]):
        deadline = time.monotonic() + 120
        while not (tmp_path / "struck").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        beat, finding = now(tmp_path)
        assert finding.state == "alive" and beat.iteration == 1
        time.sleep(7)
        beat, finding = now(tmp_path)
        assert finding.state == "stuck" and "no progress" in finding.text
    process.join()
    assert now(tmp_path)[1].state == "failed"
