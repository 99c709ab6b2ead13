"""What is wrong with a job is told by one thread of one rank, however many find it, and however they do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import LostRank
from megatron_ssft.parallel.watch import watch as module
from megatron_ssft.parallel.watch.board import Board
from megatron_ssft.parallel.watch.watch import Watch
from tests.helpers.distributed import free_port

RANKS = 4
SILENCE = 6.0
VERDICT = "no progress by rank 9"


class Ended(BaseException):
    """Instead of the end of a process, in one of its threads."""


@pytest.fixture
def job(monkeypatch):
    """A job of several watches in this process; what ends a process is noted in `ends`, in order."""
    ends = []

    def leave(status):
        ends.append((threading.current_thread().watch.rank, status))
        raise Ended

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    port = free_port()
    watches = []
    for rank in range(RANKS):
        store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=20), False)
        watches.append(RankWatch(Board(store, rank, RANKS), SILENCE, SILENCE))
    with ThreadPoolExecutor(RANKS) as ranks:
        list(ranks.map(lambda watch: watch.start({}), watches))
    yield watches, ends
    for watch in watches:
        watch.stop()


class RankWatch(Watch):
    """A watch whose threads know it, and whose judge says what the test tells it to."""

    def __init__(self, board, *limits):
        super().__init__(board, *limits)
        self.rank = board.rank
        self.verdict = None
        self._judge = self

    def look(self, places, rounds, seconds):
        return self.verdict

    def _run(self, body, *arguments):
        super()._run(body, *arguments)
        self._threads[-1].watch = self


def break_connection(watch, left):
    """The main thread's collective breaks, in a thread; `left` gets the error that it ends with."""

    def main():
        try:
            with watch.explaining():
                raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
        except LostRank as error:
            left.append(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    return thread


def lines(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("[rank ")]


def wait_for(condition, seconds=15.0):
    done = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        done.wait(0.05)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_connection_that_breaks_while_the_rank_tells_adds_nothing(job, capfd, rank):
    """As where the lost rank ends as soon as it reads the verdict: its neighbour's collective breaks then."""
    watches, ends = job
    left = []
    watches[rank].verdict = VERDICT
    wait_for(lambda: watches[rank]._telling.locked())
    main = break_connection(watches[rank], left)
    wait_for(lambda: len(ends) >= RANKS - 1 and rank in dict(ends))
    main.join(1.0)
    assert main.is_alive(), "the process would end before it has told"
    assert left == []
    assert lines(capfd) == [f"[rank {rank}] {VERDICT}"]
    assert {status for _, status in ends} == {LostRank.status}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_verdict_while_a_broken_connection_is_explained_adds_nothing(job, capfd, rank):
    watches, ends = job
    left = []
    main = break_connection(watches[rank], left)
    wait_for(lambda: watches[rank]._telling.locked())
    watches[rank].verdict = VERDICT
    main.join(15.0)
    said = lines(capfd)
    if rank == 0:
        assert len(said) == 1 and said[0].startswith("[rank 0] a connection between ranks broke")
        assert left[0].is_told
    else:  # left to the first rank that is alive
        assert said == []
        assert left[0].shared
    assert all(end[0] != rank for end in ends)


def test_the_main_thread_of_one_rank_and_the_verdict_of_another_are_told_once(job, capfd):
    watches, ends = job
    left = []
    watches[1].verdict = VERDICT
    wait_for(lambda: watches[1]._telling.locked())
    main = break_connection(watches[0], left)
    main.join(15.0)
    wait_for(lambda: 1 in dict(ends))
    assert left[0].is_told
    assert len(lines(capfd)) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_that_may_hold_the_store_ends_after_those_that_read_from_it(job, rank):
    watches, ends = job
    watches[rank].verdict = VERDICT
    wait_for(lambda: len(ends) == RANKS)
    assert [end[0] for end in ends].index(0) >= RANKS - 2  # the one that tells stays as long


def test_where_the_store_does_not_answer_the_second_rank_is_gone_before_others_say_it(job, capfd, monkeypatch):
    """With it ends its job: launchers end the ranks that are left."""
    watches, ends = job
    monkeypatch.setattr(Board, "is_first_to_tell", lambda board, verdict: threading.Event().wait(60))
    for rank in (1, 2, 3):
        watches[rank].verdict = VERDICT
    wait_for(lambda: ends)
    threading.Event().wait(1.5)  # what a launcher needs
    assert ends == [(1, LostRank.status)]
    assert lines(capfd) == [f"[rank 1] {VERDICT}"]
    wait_for(lambda: len(ends) == 3)
    assert capfd.readouterr().err.count(VERDICT) == 2  # nobody ended them


def test_an_output_that_nobody_reads_does_not_keep_the_process(job, monkeypatch):
    watches, ends = job

    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(module.sys, "stderr", Closed())
    watches[1].verdict = VERDICT
    wait_for(lambda: 1 in dict(ends))


def test_what_was_told_is_not_printed_by_the_program_too(capsys):
    error = LostRank("lost rank 9")
    error.is_told = True

    def main():
        raise error

    assert run_command(main) == LostRank.status
    assert capsys.readouterr().err == ""
