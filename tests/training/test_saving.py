"""What a run saves, keeps and says of it: --keep-last, --no-save-optim, --async-save, and disks without room."""

from __future__ import annotations

import errno
import os
import re
import signal
import time

import numpy as np
import pytest

from megatron_ssft.formats.run_folder import all_checkpoints
from tests.helpers.bad_input import start_each
from tests.helpers.checkpoints import metadata, read_tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.starts import metrics_of
from tests.helpers.training_runs import BASE, flags, logs, make_rows, write_rows

pytestmark = pytest.mark.slow  # whole runs

SAVES = BASE | {"train_iters": 6, "save_interval": 2, "global_batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"data_path": write_rows(folder / "train.jsonl", make_rows(12)), "data_cache_path": str(folder / "cache")}


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """(run folder, output) of a run with three checkpoints and no flag of this page."""
    run = tmp_path_factory.mktemp("plain") / "run"
    ((outcome,),) = run_ranks(1, start_each, [flags(SAVES | data | {"save": run})])
    assert outcome[0] == 0, outcome
    return run, outcome[1]


def tensors(run, iteration):
    folder = run / f"iter_{iteration:07d}"
    keys = sorted(metadata(folder).state_dict_metadata)
    return dict(zip(keys, read_tensors(folder, *keys)))


def same_checkpoint(run, other, iteration):
    one, two = tensors(run, iteration), tensors(other, iteration)
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)


def leftovers(run):
    return [name for name in os.listdir(run) if "partial" in name or "tmp" in name or ".old" in name]


def spaces(output):
    """The line on what checkpoints take, without what is free."""
    (line,) = [line for line in output.splitlines() if line.startswith("checkpoints: ")]
    return re.sub(r", \S+ \S+ are free$", "", line)


# -- --keep-last -----------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept_and_the_rest_is_told(data, plain, tmp_path):
    run = tmp_path / "run"
    words = flags(SAVES | data | {"save": run, "keep_last": 1, "train_iters": 2, "lr_decay_iters": 6})
    more = flags(SAVES | data | {"save": run, "load": run, "keep_last": 1})
    planned = flags(SAVES | data | {"save": tmp_path / "other", "keep_last": 1, "dry_run": True})
    ((first, second, dry),) = run_ranks(1, start_each, [words, more, planned])
    assert (first[0], second[0], dry[0]) == (0, 0, 0), (first, second, dry)
    assert all_checkpoints(run) == [6] and logs(run) == logs(plain[0]) and leftovers(run) == []
    assert "removed" not in first[1]
    removals = re.findall(r"^removed 1 checkpoint \(step (\d)\), 1 stay", second[1], re.MULTILINE)
    assert removals == ["2", "4"]
    assert "3 to be written, the last 1 stay, 2 at once while the newest is written" in spaces(dry[1])
    assert "2 to be written" in spaces(second[1])  # of three, one is there
    assert "3 to be written, all stay" in spaces(plain[1])


# -- --no-save-optim -------------------------------------------------------------------------------------------------


def test_weights_alone(data, plain, tmp_path):
    """A sixth of the bytes here. Going on needs a word, and begins with new averages."""
    run = tmp_path / "run"
    values = SAVES | data | {"save": run}
    words = [
        [*flags(values | {"train_iters": 4, "lr_decay_iters": 6}), "--no-save-optim"],
        [*flags(values | {"load": run}), "--no-save-optim"],
        [*flags(values | {"load": run}), "--no-save-optim", "--no-load-optim"],
        flags(values | {"load": run, "save": tmp_path / "tuned", "finetune": True, "train_iters": 1}),
    ]
    ((first, refused, again, tuned),) = run_ranks(1, start_each, words)
    assert first[0] == 0 and "optimizer" not in spaces(first[1]), first
    assert not [key for key in metadata(run / "iter_0000004").state_dict_metadata if key.startswith("optimizer")]
    assert refused[0] == 2 and refused[2].count("\n") == 1
    assert "holds no optimizer" in refused[2] and "--no-load-optim" in refused[2] and "--finetune" in refused[2]
    assert again[0] == 0 and "the optimizer starts anew at step 5 (--no-load-optim)" in again[1], again
    assert tuned[0] == 0, tuned
    whole = tensors(plain[0], 4)
    for name, values in tensors(run, 4).items():
        np.testing.assert_array_equal(values, whole[name], err_msg=name)
    assert [row["iteration"] for row in metrics_of(run)] == [*range(1, 7)]


def stop_after(steps, words):
    """Start with these words; SIGTERM comes within a step."""
    from megatron_ssft.training.trainer import Trainer

    advance = Trainer._advance

    def step(trainer, log):
        advance(trainer, log)
        if trainer.iteration == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._advance = step
    try:
        return start_each([words])[0]
    finally:
        Trainer._advance = advance


@pytest.mark.parametrize("steps", [3, 4])
def test_a_stopped_run_saves_its_optimizer_all_the_same(data, plain, tmp_path, steps):
    """At step 4 the weights alone are there already."""
    run = tmp_path / "run"
    words = [*flags(SAVES | data | {"save": run}), "--no-save-optim"]
    ((stopped, again),) = run_ranks(1, stop_and_go_on, steps, words, [*words, "--load", str(run)])
    assert stopped[0] == 0 and "in spite of --no-save-optim" in stopped[1], stopped
    same_checkpoint(run, plain[0], steps) if steps == 4 else None
    assert again[0] == 0, again
    assert logs(run) == logs(plain[0])
    assert not [key for key in metadata(run / "iter_0000006").state_dict_metadata if key.startswith("optimizer")]


def stop_and_go_on(steps, first, second):
    return stop_after(steps, first), start_each([second])[0]


# -- --async-save ----------------------------------------------------------------------------------------------------


def slowly(words, seconds):
    """Start with these words; every file of a checkpoint takes so long that training is ahead of it."""
    from megatron_ssft.parallel.checkpoint.writer import ThreadsWriter

    write = ThreadsWriter._write_file

    def slow(writer, file):
        time.sleep(seconds)
        return write(writer, file)

    ThreadsWriter._write_file = slow
    try:
        return start_each([words])[0]
    finally:
        ThreadsWriter._write_file = write


@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["fast disk", "slow disk"])
def test_saved_in_the_background_is_the_same(data, plain, tmp_path, seconds):
    """Weights that training changes while they are written are those of the step. Two saves never overlap."""
    run = tmp_path / "run"
    words = flags(SAVES | data | {"save": run, "async_save": True})
    ((status, output, err),) = run_ranks(1, slowly, words, seconds)
    assert status == 0, err
    assert logs(run) == logs(plain[0]) and leftovers(run) == []
    for iteration in (2, 4, 6):
        same_checkpoint(run, plain[0], iteration)
    assert output.count("in the background)") == 3
    assert ("waited " in output) == bool(seconds)


def test_a_stop_waits_for_the_save_under_way(data, plain, tmp_path):
    run = tmp_path / "run"
    words = flags(SAVES | data | {"save": run, "async_save": True})
    ((stopped, again),) = run_ranks(1, stop_and_go_on, 4, words, [*words, "--load", str(run)])
    assert stopped[0] == 0 and again[0] == 0, (stopped, again)
    assert all_checkpoints(run) == [2, 4, 6] and "stopped by SIGTERM at step 4" in stopped[1]
    assert logs(run) == logs(plain[0])


def test_what_a_stop_takes_is_said_once(data, plain):
    _, output = plain
    (line,) = [line for line in output.splitlines() if "a SIGTERM takes" in line]
    total, step, save = map(
        float, re.search(r"up to (\d+) s .* a step \(([\d.]+) s .* a save \(([\d.]+) s\)", line).groups()
    )
    assert abs(total - (step + save)) <= 0.6  # each is rounded
    seconds = [
        row["wall_seconds"] for row in metrics_of(plain[0])[:2]
    ]  # the first two steps, the first save after them
    assert abs(step - max(seconds)) <= 0.1 + 0.1 * max(seconds)
    lines = output.splitlines()
    assert lines[lines.index(line) - 1].endswith(f"iter_0000002 ({save:.1f} s)")


@pytest.mark.parametrize(("steps", "iters"), [(2, 6), (3, 6), (6, 6), (5, 5)])
def test_no_export_in_the_grace_period_but_for_the_last_one(data, tmp_path, steps, iters):
    """SIGTERM comes within a step that is saved anyway, within one that is not, and within the last step."""
    run = tmp_path / "run"
    words = [*flags(SAVES | data | {"save": run, "train_iters": iters}), "--export-hf-at-save"]
    (outcome,) = run_ranks(1, stop_after, steps, words)
    status, output, error = outcome
    assert status == 0, error
    folder = run / f"iter_{steps:07d}"
    assert folder.is_dir() and (folder / "hf").is_dir() == (steps == iters)
    assert ("is exported when the run goes on" in output) == (steps < iters)


def test_a_stop_saves_and_the_export_follows_when_the_run_goes_on(data, tmp_path):
    """Who stops a run gives it seconds. Exports at saves before and at the end are made as ever."""
    run = tmp_path / "run"
    values = SAVES | data | {"save": run, "export_hf_at_save": True, "save_interval": 4}
    words = [*flags(values), "--no-verify-hf"]
    ((stopped,),) = run_ranks(1, start_and_stop, 5, words)
    exports = {path.parent.name for path in run.glob("iter_*/hf")}
    assert stopped[0] == 0 and exports == {"iter_0000004"}, stopped
    assert f"{run / 'iter_0000005'} is exported when the run goes on" in stopped[1]
    ((again,),) = run_ranks(1, start_each, [[*words, "--load", str(run)]])
    assert again[0] == 0, again
    assert {path.parent.name for path in run.glob("iter_*/hf")} == {"iter_0000004", "iter_0000005", "iter_0000006"}


def start_and_stop(steps, words):
    return [stop_after(steps, words)]


# -- no room ---------------------------------------------------------------------------------------------------------


def full_at(words, rank, item):
    """Start with these words; on one rank the disk is full from a tensor of all that are written on."""
    from torch.distributed.checkpoint import filesystem

    real, written = filesystem._write_item, []

    def write(*args, **kwargs):
        written.append(1)
        if os.environ["RANK"] == str(rank) and len(written) > item:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    filesystem._write_item = write
    try:
        return start_each([words])[0]
    finally:
        filesystem._write_item = real


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("save", [2, 3], ids=["while training", "at the end"])
def test_a_disk_that_fills_up_in_the_background_ends_the_run(data, plain, tmp_path, save, ranks):
    """In one line, at the next step or at the end, and what was saved before is good to go on from."""
    run = tmp_path / "run"
    items = len(metadata(plain[0] / "iter_0000002").storage_data)
    words = flags(SAVES | data | {"save": run, "async_save": True, "tensor_model_parallel_size": ranks})
    item = items * (save - 1) + 5 if ranks == 1 else 5
    outcomes = run_ranks(ranks, full_at, words, ranks - 1, item)
    status, output, err = outcomes[0]
    assert status == 2 and err.count("\n") == 1 and "the disk is full" in err, (status, err)
    assert {outcome[0] for outcome in outcomes} == {2} and "finished" not in output
    assert leftovers(run) == []
    again = [*words, "--load", str(run)] if ranks == 1 else words
    outcomes = run_ranks(ranks, start_each, [again])
    assert [outcome[0] for (outcome,) in outcomes] == [0] * ranks, outcomes
    assert all_checkpoints(run) == [2, 4, 6] and leftovers(run) == []
    if ranks == 1:
        assert f"saved {run}/iter_{2 * (save - 1):07d}" in output
        assert logs(run) == logs(plain[0])


def little_room(words):
    """Start with these words where a few kilobytes are free; the names of files that were opened to be written."""
    import shutil
    from collections import namedtuple

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: namedtuple("Usage", "total used free")(10**9, 10**9, 5000)
    try:
        return start_each([words])[0]
    finally:
        shutil.disk_usage = real


@pytest.mark.parametrize("more", [{}, {"async_save": True}, {"keep_last": 1}], ids=["plain", "async", "keep-last"])
def test_no_room_is_found_out_before_anything_is_written(data, tmp_path, more):
    run = tmp_path / "run"
    ((status, output, err),) = run_ranks(1, little_room, flags(SAVES | data | {"save": run} | more))
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith(f"{run}/iter_0000002: the disk is full: it needs ") and "5 kB are free" in err
    assert ("--keep-last removes older ones only when" in err) == ("keep_last" in more)
    assert "NOT ENOUGH" in output  # said at the start
    assert all_checkpoints(run) == [] and leftovers(run) == []
