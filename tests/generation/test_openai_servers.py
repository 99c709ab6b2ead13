"""Several servers of one model: they share the requests, and one that is lost is left out."""

from __future__ import annotations

import threading

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.generation.openai_servers import OpenAIServers
from tests.generation.test_openai_backend import answers, connect, requests
from tests.helpers.completion_server import PLAIN, Server, silence, status


def pool(*servers, log=None, **options):
    said = [] if log is None else log
    return OpenAIServers([connect(server, **options) for server in servers], said.append)


def test_samples_are_those_of_one_server_and_every_server_works():
    with Server() as one:
        expected = answers(connect(one), requests(40))
    with Server() as first, Server() as second:
        backend = pool(first, second, concurrency=2)
        for server in (first, second):
            server.delay = 0.02
            server.bodies.clear()
        done = answers(backend, requests(40))
    assert {name: each.text for name, each in done.items()} == {name: each.text for name, each in expected.items()}
    shares = [len(server.bodies) for server in (first, second)]
    assert sum(shares) == 40 and min(shares) > 0


def test_a_lost_server_leaves_its_requests_to_the_others():
    said = []
    with Server() as first, Server() as second:
        backend = pool(first, second, log=said, retries=0, timeout=2.0)
        second.trouble.extend([status(503)] * 1000)
        done = answers(backend, requests(30))
        assert set(done) == {f"q{i}" for i in range(30)}
        assert all(each.text for each in done.values())
        assert len([line for line in said if "is left out, 1 of 2 servers go on" in line]) == 1
        assert second.url in said[-1]
        before = len(second.bodies)
        assert set(answers(backend, requests(5, first=30))) == {f"q{i}" for i in range(30, 35)}
        assert len(second.bodies) == before  # nor is it asked for the next questions


def test_without_any_server_the_job_ends():
    with Server() as first, Server() as second:
        backend = pool(first, second, retries=0, timeout=2.0)
        for server in (first, second):
            server.trouble.extend([status(503)] * 1000)
        with pytest.raises(UserError, match="503"):
            answers(backend, requests(10))


def test_a_silent_server_holds_nobody_up_for_longer_than_its_timeout():
    with Server() as first, Server() as second:
        backend = pool(first, second, retries=0, timeout=1.0, concurrency=1)
        second.trouble.extend([silence] * 1000)
        done = answers(backend, requests(8))
    assert set(done) == {f"q{i}" for i in range(8)}


def test_greedy_starts_come_from_all_of_them():
    with Server() as first, Server() as second:
        backend = pool(first, second)
        starts = backend.greedy(requests(12), lambda ids: len(ids) == 2)
    assert set(starts) == {f"q{i}" for i in range(12)}
    assert all(len(ids) == 2 for ids in starts.values())


def test_servers_that_answer_otherwise_are_refused():
    """Samples of one file have one origin: here one server gives its own token ids, the other text."""
    with Server() as first, Server(PLAIN) as second, pytest.raises(UserError, match="differs from") as caught:
        pool(first, second)
    assert second.url in str(caught.value)


def test_the_next_question_goes_to_whoever_is_free():
    """One server that is slow does not hold a fixed share of the questions."""
    with Server() as fast, Server() as tardy:
        backend = pool(fast, tardy, concurrency=1)
        tardy.delay = 0.3
        for server in (fast, tardy):
            server.bodies.clear()
        answers(backend, requests(30))
    assert len(fast.bodies) > 2 * len(tardy.bodies)


def test_an_early_end_leaves_no_thread_asking():
    with Server() as first, Server() as second:
        backend = pool(first, second, concurrency=2)
        first.delay = second.delay = 0.05
        generated = backend.generate(requests(200))
        next(generated)
        generated.close()
        threading.Event().wait(1.0)
        asked = len(first.bodies) + len(second.bodies)
        threading.Event().wait(1.0)
        assert len(first.bodies) + len(second.bodies) == asked < 100
