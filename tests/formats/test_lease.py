"""One job at a time has a folder: over processes and nodes, killed owners, and takers at the same moment."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from megatron_ssft.errors import StillInUse, UserError
from megatron_ssft.formats import lease
from megatron_ssft.formats.lease import LEASE, Owner, acquire

HOLD = """
import sys, pathlib
from megatron_ssft.formats.lease import acquire
from megatron_ssft.errors import UserError
try:
    held = acquire(pathlib.Path(sys.argv[1]), beat_seconds=0.05, silence_seconds=0.3)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
held.release()
"""


@pytest.fixture
def hold():
    """Starts a process that takes the lease on a folder and keeps it until its input ends."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def elsewhere(**changes):
    """An owner on another node."""
    fields = {"token": "t", "host": "node7", "pid": 1, "started": 1.0, "pid_space": "other boot", "job": "4711"}
    return Owner(**fields | changes)


def put(folder, owner):
    folder.mkdir(exist_ok=True)
    (folder / LEASE).write_bytes(msgspec.json.encode(owner))


@contextlib.contextmanager
def touched(folder):
    """Its lease gets signs of life, until the event that is given is set or the block ends."""
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(folder / LEASE)

    beat = threading.Thread(target=touch)
    beat.start()
    try:
        yield ended
    finally:
        ended.set()
        beat.join()


def take(folder, seconds=0.3):
    return acquire(folder, "--save ", beat_seconds=0.05, silence_seconds=seconds)


def refused(folder, **options):
    with pytest.raises(UserError) as caught:
        take(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_live_owner_is_named(tmp_path, hold):
    owner = hold(tmp_path)
    assert owner.stdout.readline() == "held\n"
    begin = time.monotonic()
    assert refused(tmp_path, seconds=60).startswith(f"--save {tmp_path}: is in use by process {owner.pid} on ")
    os.kill(owner.pid, signal.SIGSTOP)  # it sleeps, and may go on
    assert f"process {owner.pid} on " in refused(tmp_path, seconds=60)
    assert time.monotonic() - begin < 30
    os.kill(owner.pid, signal.SIGCONT)
    owner.communicate("")
    assert owner.returncode == 0 and list(tmp_path.iterdir()) == []
    take(tmp_path).release()


def test_a_killed_owner_is_succeeded_at_once(tmp_path, hold):
    owner = hold(tmp_path)
    assert owner.stdout.readline() == "held\n"
    owner.kill()
    owner.wait()
    assert (tmp_path / LEASE).exists()
    take(tmp_path, seconds=600).release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_is_used_again_is_another_process(tmp_path):
    put(tmp_path, elsewhere(pid=os.getpid(), pid_space=lease._pid_space()))
    take(tmp_path, seconds=600).release()


def test_an_owner_elsewhere_is_watched(tmp_path, capsys):
    put(tmp_path, elsewhere())
    with touched(tmp_path):
        assert "is in use by process 1 on node7 (SLURM job 4711)" in refused(tmp_path, seconds=60)
    assert "waiting up to 60 s" in capsys.readouterr().out
    take(tmp_path).release()  # silent now


def test_remains_of_the_same_job_are_waited_for(tmp_path, monkeypatch, capsys):
    """A lost node may live on for a while, and with it the rank that holds the folder."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    put(tmp_path, elsewhere())
    with touched(tmp_path) as ended:
        with pytest.raises(StillInUse, match="by an earlier attempt of this job, process 1 on node7") as caught:
            acquire(tmp_path, beat_seconds=0.05, silence_seconds=0.6, remains_seconds=1.0)
        assert caught.value.status == 75  # not the input's fault: try again
        threading.Timer(1.0, ended.set).start()
        acquire(tmp_path, beat_seconds=0.05, silence_seconds=0.6, remains_seconds=60.0).release()
    assert "held by an earlier attempt of this job" in capsys.readouterr().out


def test_a_lease_that_cannot_be_read_for_a_moment_is_touched_again(tmp_path, monkeypatch):
    held, real = take(tmp_path), lease._owner
    failures = []

    def away(path):
        if len(failures) < 3:
            failures.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(lease, "_owner", away)
    deadline = time.monotonic() + 10
    while len(failures) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    before = (tmp_path / LEASE).stat().st_mtime_ns
    while (tmp_path / LEASE).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.release()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"token": 1}'])
def test_a_torn_lease_counts_until_it_is_silent(tmp_path, content):
    (tmp_path / LEASE).write_bytes(content)
    begin = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize("left", ["nothing", "a dead owner", "a silent owner"])
def test_one_of_many_takers_gets_it(tmp_path, hold, left):
    if left != "nothing":
        put(tmp_path, elsewhere(pid_space=lease._pid_space() if left == "a dead owner" else "other", pid=2**22 + 1))
    takers = [hold(tmp_path) for _ in range(8)]
    lines = [next(line for line in taker.stdout if "waiting up to" not in line) for taker in takers]
    assert lines.count("held\n") == 1 and sum("is in use by" in line for line in lines) == 7
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]


def test_an_owner_learns_that_it_was_succeeded(tmp_path):
    held = take(tmp_path)
    held.check()
    put(tmp_path, elsewhere())
    with pytest.raises(UserError, match=r"was taken over by process 1 on node7.*nothing more is written"):
        held.check()
    held.release()
    assert (tmp_path / LEASE).exists()  # it belongs to another


def test_an_owner_learns_that_its_folder_is_gone(tmp_path):
    held = take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="was the folder moved or deleted"):
        held.check()
    held.release()


def test_an_owner_gives_signs_of_life(tmp_path):
    held = take(tmp_path)
    seen = {lease._look(tmp_path / LEASE)[0]}
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
        seen.add(lease._look(tmp_path / LEASE)[0])
    assert len(seen) >= 4
    held.release()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links(tmp_path, monkeypatch, code):
    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    held = take(tmp_path)
    assert f"process {os.getpid()} on " in refused(tmp_path)
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_it_go_where_they_stay_empty(tmp_path):
    take(tmp_path / "a" / "b").release()
    assert list(tmp_path.iterdir()) == []
    held = take(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "checkpoint").touch()
    held.release()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["checkpoint"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file where a folder is needed"):
            take(folder)
