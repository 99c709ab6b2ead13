"""The online loop with a server of the current weights, both stand-ins."""

from __future__ import annotations

import signal
import socket
import sys
import time

import pytest

from tests.helpers.distributed import free_port


def served(place, **changes):
    """Flags for the stand-in of a server."""
    port = changes.pop("port", None) or free_port()
    flags = {
        "--backend": "openai",
        "--base-url": f"http://127.0.0.1:{port}/v1",
        "--serve": f"{sys.executable} {place.folder / 'server.py'} {{model}} {port}",
    }
    return [word for pair in (flags | changes).items() for word in pair]


def test_a_server_for_each_generation_and_gone_before_the_next_stage(place):
    status, _, err = place.run(*served(place))
    assert status == 0, err
    assert len(place.lines("engines")) == 2  # engines in sessions of their own, deaf to SIGTERM
    assert place.journal("race") == [] and place.left_behind() == []
    hf = place.work / "round_000" / "run" / "iter_0000003" / "hf"
    log = (place.work / "round_001" / "server.log").read_text().splitlines()
    assert log[0] == f"loading {hf}" and log[-1] == "bye"  # told to end before it was made to


@pytest.mark.parametrize(("how", "said"), [("die", "no GPU here | it says"), ("die late", "CUDA out of luck")])
def test_a_server_that_dies(place, how, said):
    begin = time.monotonic()
    flags = served(place)
    status, _, err = place.run(*flags, STUB_SERVER=how)
    assert time.monotonic() - begin < 20
    assert status == 3 and err.count("\n") == 1
    assert err.startswith("the server ended with status 3: ") and said in err and "server.log)" in err
    assert place.left_behind() == []
    status, _, err = place.run(*flags, rounds=1)
    assert status == 0, err


def test_a_server_that_never_answers(place):
    flags = served(place, **{"--serve-timeout": "1"})
    status, _, err = place.run(*flags, STUB_SERVER="silent")
    assert status == 2 and err.count("\n") == 1
    assert "no connection" in err and "for 1 s" in err and "--serve-timeout" in err and "loading" in err
    assert place.left_behind() == []


def test_another_server_at_the_same_port_is_not_asked(place):
    """It would answer with other weights, and nobody would notice."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        status, _, err = place.run(*served(place, port=listening.getsockname()[1]))
    assert status == 2 and err.count("\n") == 1 and "something is there already" in err
    assert place.journal("begin") == []


def test_another_port_is_no_other_round(place):
    assert place.run(*served(place), rounds=1, STUB_FAIL="generate:round_000")[0] == 7
    status, _, err = place.run(*served(place), rounds=1)
    assert status == 0, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_the_server_starts(place, number):
    process = place.start(*served(place), STUB_SERVER="silent")
    deadline = time.monotonic() + 20
    while not place.lines("engines"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    status, _, err = place.finish(process)
    if number == signal.SIGTERM:
        assert status == 143 and err == "stopped by SIGTERM while the server started\n"
        assert place.left_behind() == []
    status, _, err = place.run(*served(place), rounds=1)
    assert status == 0, err
    assert place.journal("race") == [] and place.left_behind() == []
