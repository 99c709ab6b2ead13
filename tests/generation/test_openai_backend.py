"""Generation by a server: every way of asking, and every kind of trouble."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.generation.http_client import HttpClient, Refused
from megatron_ssft.generation.model_folder import ModelFolder
from megatron_ssft.generation.openai_backend import OpenAIBackend, text_of
from megatron_ssft.generation.requests import Request, RolloutMaker, Sampling, TagPlan
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer
from tests.helpers.completion_server import EXTENDED, PLAIN, TOKENIZER, Server, garbage, hang_up, slow, status

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


def requests(number=6, prompt="abc"):
    return [Request(f"q{i}", tuple(TOKENIZER.encode(prompt)), (120,), 0, 0, i, 8) for i in range(number)]


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


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"text": "a", "finish_reason": "content_filter"}]},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "a", "finish_reason": "stop"}] * 2},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": "x"}]},
        {"choices": [{"text": "a", "finish_reason": "stop"}]},  # no ids, which came before
    ],
)
def test_answers_of_another_shape_are_an_error(answer):
    with Server(trouble=[None, lambda handler: handler.send(200, answer)]) as server:
        backend = connect(server)
        with pytest.raises(UserError, match="no usable completion|token ids came with some"):
            list(backend.generate(requests(1)))


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
