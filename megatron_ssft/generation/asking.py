"""Requests to one server or several, many under way at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ssft.generation.http_client import RequestFailed
from megatron_ssft.generation.requests import Failed, Generated, Request


class Server(Protocol):
    """Answers requests, several threads at a time."""

    @property
    def url(self) -> str: ...

    @property
    def concurrency(self) -> int:
        """Requests under way at a time."""

    def ask(self, request: Request, temperature: float) -> Generated | Failed:
        """Get one sample, or the reason why there is none. Raises RequestFailed where the server gives nobody any."""

    def give_up(self) -> None:
        """Wait for nothing any more."""


@dataclass(frozen=True)
class _Trouble:
    """What a server's thread ended with, and the request that it has not answered."""

    server: Server
    request: Request
    error: Exception


def ask_all(
    servers: Sequence[Server], requests: Sequence[Request], temperature: float, tell: Callable[[str], None]
) -> Iterator[Generated | Failed]:
    """Yield the answers as they come; whichever server is free takes the next request.

    A server that answers nobody is left out, which `tell` is told, and the others take what it had. Raises UserError
    where none is left.
    """
    over = threading.Event()
    waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Generated | Failed | _Trouble] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)

    def work(server: Server) -> None:
        while (request := waiting.get()) is not None and not over.is_set():
            try:
                done.put(server.ask(request, temperature))
            except Exception as error:  # noqa: BLE001  raised again where it is looked at
                done.put(_Trouble(server, request, error))
                return

    started = 0
    for server in servers:
        for _ in range(min(server.concurrency, len(requests))):
            # Daemons: an answer that is still awaited when the program gives up must not keep it alive.
            threading.Thread(target=work, args=(server,), daemon=True).start()
            started += 1
    left = list(servers)
    answered = 0
    try:
        while answered < len(requests):
            result = done.get()
            if not isinstance(result, _Trouble):
                answered += 1
                yield result
                continue
            if result.server in left:
                left.remove(result.server)
                result.server.give_up()
                if not left or not isinstance(result.error, RequestFailed):
                    raise result.error
                tell(f"{result.server.url} is left out, {len(left)} of {len(servers)} servers go on: {result.error}")
            waiting.put(result.request)
    finally:
        over.set()
        for _ in range(started):
            waiting.put(None)
