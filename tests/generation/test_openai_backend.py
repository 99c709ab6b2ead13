"""Generation by a server: every way of asking, and every kind of trouble."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from pathlib import Path

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.generation.http_client import HttpClient, Refused, Unanswered
from megatron_ssft.generation.model_folder import ModelFolder
from megatron_ssft.generation.openai_backend import OpenAIBackend, text_of
from megatron_ssft.generation.openai_protocol import CompletionBody
from megatron_ssft.generation.requests import Failed, Generated, Request, RolloutMaker, Sampling, TagPlan
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer
from tests.helpers.completion_server import (
    EXTENDED,
    PLAIN,
    TOKENIZER,
    Server,
    cut,
    cut_without_length,
    ends_by,
    garbage,
    gives,
    hang_up,
    restart,
    silence,
    slow,
    status,
    trickle,
    trickle_head,
)

SAMPLING = Sampling(temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=8)
MODEL = ModelFolder(
    Path("folder"), TOKENIZER, build_forking_tokens(TOKENIZER, 2, "text", "<{i}>"), {256, 10}, 99, "m", "t"
)


def connect(
    server, *, sampling=SAMPLING, model=MODEL, served_model=None, concurrency=4, timeout=5.0, retries=3, log=None
):
    client = HttpClient(server.url, timeout, retries, first_delay=0.01)
    said = [] if log is None else log
    return OpenAIBackend(model, sampling, client, served_model=served_model, concurrency=concurrency, log=said.append)


def requests(number=6, prompt="abc", first=0):
    """Request i has the seed i."""
    places = range(first, first + number)
    return [Request(f"q{i}", tuple(TOKENIZER.encode(prompt)), (120,), 0, 0, i, 8) for i in places]


def answers(backend, wanted):
    return {done.request.id: done for done in backend.generate(wanted)}


# -- how the server wants to be asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("takes", "ids", "sends_ids", "returns_ids"),
    [
        (PLAIN | EXTENDED, True, True, True),
        (PLAIN, True, True, False),
        (PLAIN | {"generation_config"}, False, False, False),
        (PLAIN, False, False, False),
    ],
    ids=["extended", "ids", "configured", "text"],
)
def test_every_dialect_gives_the_same_rollouts(takes, ids, sends_ids, returns_ids):
    with Server(takes, ids) as server:
        said = []
        backend = connect(server, log=said)
        server.bodies.clear()
        done = answers(backend, requests())
    assert backend.origin["token_ids"] == ("server" if returns_ids else "tokenized again")
    assert ("token ids" if sends_ids else "text") in said[0]
    assert all(isinstance(body["prompt"], list) == sends_ids for body in server.bodies)
    assert {body["seed"]: body["prompt"] for body in server.bodies}.keys() == set(range(6))
    assert {body["temperature"] for body in server.bodies} == {0.7}
    maker = RolloutMaker(MODEL, TagPlan("fixed", 1, 0), {})
    rows = {name: maker.rollout(generated) for name, generated in done.items()}
    assert {name: row.text for name, row in rows.items()} == {f"q{i}": f"bcx{i}" for i in range(6)}
    assert rows["q3"].token_ids == (*TOKENIZER.encode("bcx3"), 256)
    assert rows["q3"].finish_reason == "stop"


def test_all_that_shapes_samples_is_spelled_out():
    """vLLM takes what is missing from the model's generation_config.json, transformers from its own defaults."""
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=8)
    with Server() as server:
        list(connect(server, sampling=sampling).generate(requests(1)))
    body = server.bodies[-1]
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (0.9, 7, 0.0, 1.0)
    assert (body["stop_token_ids"], body["max_tokens"], body["model"]) == ([10, 256], 8, "served")
    with Server(PLAIN | {"generation_config"}, ids=False) as server:
        list(connect(server, sampling=sampling).generate(requests(1)))
    configuration = json.loads(server.bodies[-1]["generation_config"])
    assert configuration == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_new_tokens": 8,
        "eos_token_id": [10, 256],
        "pad_token_id": 10,
    }
    with Server(PLAIN) as server, pytest.raises(UserError, match="--top-k 7: .* does not take it"):
        connect(server, sampling=sampling)


def test_the_model_is_chosen_from_what_is_served():
    with Server(models=("a", "b")) as server:
        with pytest.raises(UserError, match="a, b; choose one by --served-model"):
            connect(server)
        assert connect(server, served_model="b").origin["served_model"] == "b"
        said = []
        assert connect(server, served_model="c", log=said).origin["served_model"] == "c"
        assert "does not list c" in said[0]


def test_a_server_with_another_tokenizer_is_found_out():
    def miscounts(handler):
        choice = {"text": "a", "finish_reason": "stop", "token_ids": [97]}
        handler.send(200, {"choices": [choice], "usage": {"prompt_tokens": 5}})

    with Server(trouble=[None, miscounts]) as server, pytest.raises(UserError, match="is 5 tokens there and 4 here"):
        list(connect(server).generate(requests(1)))


class Bos(CharTokenizer):
    """Begins texts with byte 1 and reads `~` as nothing."""

    def __init__(self):
        super().__init__()
        self.bos_id = 1

    def encode(self, text):
        return super().encode(text.replace("~", ""))


def test_text_prompts_must_give_the_same_ids_again():
    assert text_of(TOKENIZER.encode("ab"), TOKENIZER) == "ab"
    assert text_of([97, 300], TOKENIZER) is None  # an entry without a spelling
    assert text_of([0xC3], TOKENIZER) is None  # half of a letter
    assert text_of([1, 97], Bos()) == "a"  # the server adds the first token
    assert text_of([97], Bos()) is None
    assert text_of([1, 97, 126], Bos()) is None
    with Server(PLAIN, ids=False) as server:
        backend = connect(server)
        with pytest.raises(UserError, match="question 'q1': the text of its prompt does not give the same tokens"):
            list(backend.generate([*requests(1), Request("q1", (0xC3,), (), 0, 0, 1, 8)]))
        assert len(server.bodies) == 4, "nothing was asked but how to ask"


# -- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [status(429), status(500), status(503), garbage, hang_up, slow])
def test_what_may_pass_is_tried_again(trouble):
    with Server(trouble=[None, trouble, trouble]) as server:
        backend = connect(server, timeout=0.3, concurrency=1)
        done = answers(backend, requests(3))
    assert {name: d.text for name, d in done.items()} == {f"q{i}": f"bcx{i}" for i in range(3)}
    assert len(server.bodies) == 1 + 2 + 3


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (status(429, "busy"), "status 429: .*busy.* [(]4 attempts[)]; start again to go on"),
        (status(500, "two\nlines"), "status 500"),
        (garbage, "not a JSON object"),
        (hang_up, "connection"),
        (slow, "no answer within 0.2 s"),
    ],
)
def test_what_does_not_pass_ends_the_run(trouble, reason):
    with Server(trouble=[None, *[trouble] * 20]) as server:
        backend = connect(server, timeout=0.2, concurrency=2)
        with pytest.raises(UserError, match=reason) as caught:
            list(backend.generate(requests(4)))
    assert "\n" not in str(caught.value)


def test_what_is_refused_is_not_tried_again():
    with Server(trouble=[None, status(404, "no such model")]) as server:
        backend = connect(server, concurrency=1)
        with pytest.raises(Refused, match="status 404: .*no such model"):
            list(backend.generate(requests(3)))
        assert len(server.bodies) == 2
    with Server(takes={"prompt"}) as server, pytest.raises(UserError, match="no way of asking was accepted.*422"):
        connect(server)


def choice(**changes):
    return {"text": "a", "finish_reason": "stop", "token_ids": [97]} | changes


NO_RESULTS = [
    ({}, "no usable completion: {}"),
    ({"choices": []}, "0 choices instead of one"),
    ({"choices": {"text": "a"}}, "no usable completion"),
    ({"choices": [choice()] * 2}, "2 choices instead of one"),
    ({"choices": [choice(finish_reason="content_filter")]}, 'finish_reason "content_filter"'),
    ({"choices": [choice(finish_reason="abort")]}, 'finish_reason "abort"'),
    ({"choices": [choice(finish_reason=None)]}, "finish_reason null"),
    ({"choices": [choice(finish_reason="repetition")]}, 'finish_reason "repetition"'),
    ({"choices": [choice(finish_reason=["stop"])]}, 'finish_reason ["stop"]'),
    ({"choices": [choice(text=None)]}, "no usable completion"),
    ({"choices": [choice(token_ids="x")]}, "no usable completion"),
    ({"choices": [{"text": "a"}]}, "no usable completion"),
    ({"choices": ["a"]}, "no usable completion"),
    ({"error": {"message": "engine\ndied", "code": 500}}, "an error under status 200: "),
    ({"object": "error", "message": "engine died"}, 'an error under status 200: "engine died"'),
]


@pytest.mark.parametrize(("answer", "reason"), NO_RESULTS)
def test_an_answer_that_is_no_result_is_tried_again_then_noted(answer, reason):
    with Server(trouble=[None, gives(answer)]) as server:
        assert answers(connect(server, concurrency=1), requests(1))["q0"].text == "bcx0"
    with Server(poison={21: gives(answer)}) as server:
        backend = connect(server, concurrency=1, retries=2)
        server.bodies.clear()
        done = answers(backend, requests(3, first=20))
        assert [body["seed"] for body in server.bodies] == [20, 21, 21, 21, 22]
    assert isinstance(done["q21"], Failed) and reason in done["q21"].reason and "\n" not in done["q21"].reason
    assert [done[name].text for name in ("q20", "q22")] == ["bcx20", "bcx22"]


def test_answers_without_the_ids_that_came_before_end_the_run():
    with Server(trouble=[None, gives({"choices": [{"text": "a", "finish_reason": "stop"}]})]) as server:
        backend = connect(server)
        with pytest.raises(UserError, match="token ids came with some"):
            list(backend.generate(requests(1)))


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (status(500, "poison"), "status 500: "),
        (status(429), "status 429: "),
        (status(400, "too long"), "status 400: "),
        (status(422), "status 422: "),
        (hang_up, "connection"),
        (cut, "the connection broke"),
        (cut_without_length, "an answer that is not a JSON object"),
        (silence, "no answer within 0.3 s"),
        (trickle, "no answer within 0.3 s"),
        (trickle_head, "no answer within 0.3 s"),
    ],
)
@pytest.mark.parametrize("place", [20, 21, 22])
def test_one_request_that_never_passes_does_not_end_the_run(trouble, reason, place):
    """Whether others were answered before it, after it or around it."""
    with Server(poison={place: trouble}) as server:
        done = answers(connect(server, concurrency=1, timeout=0.3, retries=1), requests(3, first=20))
    assert isinstance(done[f"q{place}"], Failed) and reason in done[f"q{place}"].reason
    assert sum(isinstance(d, Generated) for d in done.values()) == 2


def test_many_requests_in_a_row_may_fail():
    poison = {seed: status(500) for seed in range(21, 50)}
    with Server(poison=poison) as server:
        done = answers(connect(server, concurrency=8, retries=1), requests(32, first=20))
    assert {int(name[1:]) for name, d in done.items() if isinstance(d, Failed)} == {*poison}


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_is_refused_to_everybody_ends_the_run(code):
    with Server(poison={21: status(code)}) as server, pytest.raises(Refused, match=f"status {code}"):
        list(connect(server, concurrency=1).generate(requests(3, first=20)))


@pytest.mark.parametrize("trouble", [silence, trickle, trickle_head])
@pytest.mark.parametrize("path", ["/completions", "/models"])
def test_the_timeout_is_one_of_the_whole_request(trouble, path):
    """A byte every twentieth of a second is never late for a socket."""
    with Server(trouble=[trouble] * 9) as server:
        server.models_trouble = trouble
        client = HttpClient(server.url, 0.4, 1, first_delay=0.01)
        started = time.monotonic()
        with pytest.raises(Unanswered, match=r"no answer within 0.4 s \(2 attempts\)"):
            if path == "/models":
                client.get(path)
            else:
                body = CompletionBody(model="m", prompt=[1], max_tokens=1, temperature=0.0, top_p=1.0, seed=1)
                client.post(path, body, lambda answer: answer)
        taken = time.monotonic() - started
    assert 0.8 <= taken < 3.0 < client.longest


def test_the_timeout_holds_while_connecting():
    """A listener whose queue is full lets nobody in."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        client = HttpClient(f"http://127.0.0.1:{full.getsockname()[1]}", 0.3, 0)
        started = time.monotonic()
        with pytest.raises(Unanswered, match="no answer within 0.3 s"):
            client.get("/models")
        assert time.monotonic() - started < 3.0


def test_the_timeout_holds_while_a_name_is_looked_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(Unanswered, match="no answer within 0.2 s"):
        HttpClient("http://127.0.0.1:9", 0.2, 0).get("/models")
    assert time.monotonic() - started < 3.0


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e8])
def test_a_timeout_that_no_clock_has_is_refused(timeout):
    with pytest.raises(UserError, match="--timeout"):
        HttpClient("http://127.0.0.1:9", timeout, 0)


MIX = [
    *(status(429), status(500), status(503), cut, cut_without_length, trickle, trickle_head, silence, hang_up, garbage),
    *(gives({"choices": []}), gives({"error": "no"}), ends_by("abort"), ends_by(None), ends_by("repetition"), restart),
]


@pytest.mark.parametrize("seed", range(3))
def test_on_the_worst_of_days_no_sample_is_lost(seed):
    """Every second answer is one of every kind of trouble, and some requests never pass. It ends in the stated time."""
    draws = random.Random(seed)
    trouble = [draws.choice(MIX) if draws.random() < 0.5 else None for _ in range(400)]
    poison = {place: draws.choice(MIX[:-1]) for place in draws.sample(range(20, 60), 4)}
    with Server(trouble=[None, *trouble], poison=poison) as server:
        backend = connect(server, concurrency=8, timeout=0.25, retries=7)
        started = time.monotonic()
        done = list(backend.generate(requests(40, first=20)))
        taken = time.monotonic() - started
    assert sorted(d.request.id for d in done) == sorted(r.id for r in requests(40, first=20))
    failed = {d.request.seed for d in done if isinstance(d, Failed)}
    assert {*poison} <= failed and len(failed) <= 8, "the others have eight attempts"
    assert all(d.text == f"bcx{d.request.seed}" for d in done if isinstance(d, Generated))
    rounds = 40 / 8
    assert taken < rounds * 8 * (0.25 + 1.28), "attempts, and the waits of a hundredth of a second doubled"


def test_a_server_that_starts_again_is_waited_for():
    with Server() as first:
        backend = connect(first, concurrency=2, retries=8)
        port = first.server_port
    again = threading.Timer(0.3, lambda: servers.append(Server(port=port).__enter__()))
    servers = []
    again.start()
    try:
        assert {d.text for d in backend.generate(requests(4))} == {f"bcx{i}" for i in range(4)}
    finally:
        again.join()
        servers[0].__exit__()


def test_a_server_may_say_how_long_to_wait():
    with Server(trouble=[None, status(429, headers=[("Retry-After", "0.5")])]) as server:
        backend = connect(server, concurrency=1)
        started = time.monotonic()
        list(backend.generate(requests(1)))
    assert time.monotonic() - started >= 0.5


def test_requests_are_under_way_together_but_not_too_many():
    with Server(trouble=[None, *[lambda handler: (time.sleep(0.2), status(500)(handler))] * 6]) as server:
        backend = connect(server, concurrency=3)
        assert len(list(backend.generate(requests(6)))) == 6
    assert server.most_under_way == 3


def test_what_was_answered_before_the_trouble_is_kept():
    with Server(trouble=[None, None, None, *[status(500)] * 9]) as server:
        backend, got = connect(server, concurrency=1, retries=0), []
        with pytest.raises(UserError, match="500"):
            for done in backend.generate(requests(5)):
                got.append(done.request.id)
    assert got == ["q0", "q1"]


def test_no_server_and_no_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = HttpClient(url, 1.0, 1, first_delay=0.01)
    assert client.base_url == url + "/v1"
    with pytest.raises(UserError, match="no connection"):
        OpenAIBackend(MODEL, SAMPLING, client, served_model=None, concurrency=1, log=print)
    for wrong in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(UserError, match="--base-url"):
            HttpClient(wrong, 1.0, 1)


def test_greedy_starts_end_with_the_tag():
    def writes(text):
        def answer(handler):
            choice = {"text": text, "finish_reason": "length", "token_ids": TOKENIZER.encode(text)}
            handler.send(200, {"choices": [choice]})

        return answer

    with Server(trouble=[None, writes("ab<2>cd"), writes("nothing")]) as server:
        backend = connect(server, concurrency=1)
        found = backend.greedy(requests(2), lambda ids: ids[-1] == ord(">"))
        assert found == {"q0": tuple(TOKENIZER.encode("ab<2>"))}
        assert {body["temperature"] for body in server.bodies[1:]} == {0.0}
