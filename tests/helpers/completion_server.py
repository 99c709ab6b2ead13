"""A small server of OpenAI's completions protocol, with every kind of bad day."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_ssft.tokenizers.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer()
EXTENDED = {"top_k", "min_p", "repetition_penalty", "stop_token_ids", "skip_special_tokens", "return_token_ids"}
PLAIN = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


class Server(ThreadingHTTPServer):
    """Answers every prompt with its last three characters and its seed; `takes` says which fields it knows."""

    daemon_threads = True

    def __init__(
        self,
        takes=PLAIN | EXTENDED,
        ids=True,
        models=("served",),
        trouble=(),
        poison=None,
        port=0,
        tokenizer=None,
        writes=None,
        host="127.0.0.1",
    ):
        super().__init__((host, port), Handler)
        self.takes, self.ids, self.models = takes, ids, models
        self.tokenizer = tokenizer or TOKENIZER
        self.writes = writes
        """Seed of a request -> the ids that the model writes, which end by their number."""
        self.honours_skip = True
        """Whether it does what skip_special_tokens says, where it takes the field; else special tokens are left out."""
        self.poison = poison or {}
        """Seed of a request -> what it gets instead of an answer, every time."""
        self.models_trouble = None
        """What the list of models gets instead of an answer, every time."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.down_until = 0.0
        """Until then (time.monotonic) connections are closed as they come: the server is starting again."""
        self.trouble = list(trouble)
        """What the next completions get instead of an answer."""
        self.bodies, self.under_way, self.most_under_way, self.lock = [], 0, 0, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def verify_request(self, request, client_address):
        return time.monotonic() >= self.down_until

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, data, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if isinstance(data, bytes) else json.dumps(data).encode())

    def do_GET(self):
        if self.server.models_trouble is not None:
            self.server.models_trouble(self)
            return
        self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            trouble = server.trouble.pop(0) if server.trouble else None
            trouble = server.poison.get(body["seed"], trouble)
        try:
            self.answer(server, body, trouble)
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, server, body, trouble):
        time.sleep(server.delay)
        if callable(trouble):
            trouble(self)
        elif set(body) - server.takes:
            self.send(422, {"detail": f"unexpected {sorted(set(body) - server.takes)}"})
        elif isinstance(body["prompt"], list) and not server.ids:
            self.send(400, {"detail": "prompt must be a string."})
        elif server.writes is not None:
            self.send(200, written(body, server))
        else:
            self.send(200, completion(body, trouble or {}, server.tokenizer))


def written(body, server):
    """What `server.writes` says, or the token that `logit_bias` asks for, as ids or as text."""
    ids = [int(i) for i in body.get("logit_bias", {})] or list(server.writes(body["seed"]))[: body["max_tokens"]]
    shows = server.honours_skip and body.get("skip_special_tokens") is False
    decode = server.tokenizer.decode if shows else server.tokenizer.decode_without_special
    choice = {"index": 0, "text": decode(ids), "finish_reason": "length"}
    return {"choices": [choice | ({"token_ids": ids} if body.get("return_token_ids") else {})]}


def completion(body, changes, tokenizer):
    """The answer to `body`; `changes` replace fields of the only choice."""
    ids = body["prompt"] if isinstance(body["prompt"], list) else tokenizer.encode(body["prompt"])
    text = (tokenizer.decode(ids)[-3:] + str(body["seed"]))[: body["max_tokens"]]
    choice = {
        "index": 0,
        "text": text,
        "finish_reason": "length" if len(text) == body["max_tokens"] else "stop",
    }
    if body.get("return_token_ids"):
        choice["token_ids"] = tokenizer.encode(text) + [tokenizer.eos_id] * (choice["finish_reason"] == "stop")
    return {"choices": [choice | changes], "usage": {"prompt_tokens": len(ids)}}


def status(code, text="no", headers=()):
    return lambda handler: handler.send(code, {"error": text}, headers)


def garbage(handler):
    handler.send(200, b"<html>")


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def slow(handler):
    time.sleep(1.0)


def gives(answer):
    """A trouble: this answer with status 200."""
    return lambda handler: handler.send(200, answer)


def ends_by(reason):
    """A trouble: an answer like any other but for its finish_reason."""
    return {"finish_reason": reason}


def cut(handler):
    """A body that ends before its length, in the middle of the JSON."""
    body = json.dumps({"choices": [{"text": "cut", "finish_reason": "stop"}]}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def cut_without_length(handler):
    handler.send(200, b'{"choices": [{"text": "cut')


def trickle(handler):
    """A byte now and then, without an end."""
    handler.send_response(200)
    handler.end_headers()
    _drip(handler)


def trickle_head(handler):
    """The same before the first header is over."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    _drip(handler)


def _drip(handler):
    for _ in range(600):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return  # the client has hung up
        time.sleep(0.05)


def silence(handler):
    """No byte for longer than anybody waits here, or until the client hangs up."""
    handler.connection.settimeout(30)
    with contextlib.suppress(OSError):
        handler.connection.recv(1)


def restart(handler):
    """The connection is lost, and for a while so is every other one."""
    handler.server.down_until = time.monotonic() + 0.15
    hang_up(handler)
