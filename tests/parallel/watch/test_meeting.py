"""An address where nobody is to be met ends in one line, in time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta

import pytest

from megatron_ssft.errors import LostRank, UserError
from megatron_ssft.parallel.watch.meeting import meet
from tests.helpers.captured import run_captured
from tests.helpers.distributed import free_port, run_ranks

SECONDS = 3.0


@contextlib.contextmanager
def nobody():
    yield "127.0.0.1", free_port()


@contextlib.contextmanager
def unknown_name():
    yield "no-such-host.invalid", free_port()


@contextlib.contextmanager
def impossible_name():
    yield "a" * 70 + ".example", free_port()


@contextlib.contextmanager
def black_hole():
    """A port that answers no connection: its queue is full."""
    with socket.socket() as listening, contextlib.ExitStack() as connections:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = connections.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()


@contextlib.contextmanager
def another_program():
    """A program that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield listening.getsockname()


PLACES = {
    nobody: "nothing listens at that port",
    unknown_name: "the name is not known here",
    impossible_name: "this is no name of a host",
    black_hole: "",
    another_program: "something listens there that gives no answer",
}


def try_to_meet(address, port, rank, world_size=2):
    """What it ends in, and after how many seconds."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    begin = time.monotonic()
    try:
        meet(rank, world_size, timedelta(seconds=SECONDS), timedelta(seconds=60), {})
    except UserError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    return time.monotonic() - begin


def captured(*args):
    return run_captured(lambda: try_to_meet(*args))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_nobody_there(place):
    with place() as (address, port):
        seconds, out, err = run_ranks(1, captured, address, port, 7)[0]
    assert seconds < SECONDS + 3.0
    assert err == ""
    assert out.count("\n") == 1
    expected = (
        f"{LostRank.__name__}: rank 7 cannot reach rank 0 at {address}:{port} (MASTER_ADDR, MASTER_PORT) within 3 s"
    )
    assert out.startswith(expected) and PLACES[place] in out and "--distributed-timeout-minutes" in out


def test_a_process_that_is_alone_goes_to_no_meeting():
    with black_hole() as (address, port):
        seconds, out, err = run_ranks(1, captured, address, port, 0, 1)[0]
    assert (out, err) == ("", "") and seconds < 1.0


@pytest.mark.parametrize(
    ("address", "port", "text"),
    [
        ("h", "0", "MASTER_PORT '0'"),
        ("h", "x", "MASTER_PORT 'x'"),
        ("", "1", "MASTER_ADDR and MASTER_PORT are not set"),
    ],
)
def test_no_place_at_all(address, port, text):
    _, out, _ = run_ranks(1, captured, address, port, 1)[0]
    assert out.startswith(f"UserError: {text}")


def late_store(port):
    """Ranks meet though the first one is late."""
    rank = int(os.environ["RANK"])
    if rank == 0:
        time.sleep(1.5)
    store, watch = meet(rank, 2, timedelta(seconds=20), timedelta(seconds=60), {})
    store.set(f"hello {rank}", "here")
    text = store.get(f"hello {1 - rank}").decode()
    watch.stop(early=rank == 1)
    if rank == 0:
        time.sleep(0.5)
    return text


def test_those_who_come_first_wait_for_the_one_who_is_late():
    assert run_ranks(2, late_store, 0) == ["here", "here"]
