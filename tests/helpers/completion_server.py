"""A small server of OpenAI's completions protocol, with every kind of bad day."""

from __future__ import annotations

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

    def __init__(self, takes=PLAIN | EXTENDED, ids=True, models=("served",), trouble=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.takes, self.ids, self.models = takes, ids, models
        self.trouble = list(trouble)
        """What the next completions get instead of an answer."""
        self.bodies, self.under_way, self.most_under_way, self.lock = [], 0, 0, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

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
        self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            trouble = server.trouble.pop(0) if server.trouble else None
        try:
            self.answer(server, body, trouble)
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, server, body, trouble):
        if callable(trouble):
            trouble(self)
        elif set(body) - server.takes:
            self.send(422, {"detail": f"unexpected {sorted(set(body) - server.takes)}"})
        elif isinstance(body["prompt"], list) and not server.ids:
            self.send(400, {"detail": "prompt must be a string."})
        else:
            ids = body["prompt"] if isinstance(body["prompt"], list) else TOKENIZER.encode(body["prompt"])
            text = (TOKENIZER.decode(ids)[-3:] + str(body["seed"]))[: body["max_tokens"]]
            choice = {
                "index": 0,
                "text": text,
                "finish_reason": "length" if len(text) == body["max_tokens"] else "stop",
            }
            if body.get("return_token_ids"):
                choice["token_ids"] = TOKENIZER.encode(text) + [256] * (choice["finish_reason"] == "stop")
            self.send(200, {"choices": [choice], "usage": {"prompt_tokens": len(ids)}})


def status(code, text="no", headers=()):
    return lambda handler: handler.send(code, {"error": text}, headers)


def garbage(handler):
    handler.send(200, b"<html>")


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def slow(handler):
    time.sleep(1.0)
