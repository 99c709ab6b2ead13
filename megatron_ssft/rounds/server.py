"""A server of the current weights, or several, for the time of one generation."""

from __future__ import annotations

import contextlib
import shlex
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.generation.http_client import HttpClient
from megatron_ssft.rounds.processes import Children, StageFailure, end, raise_if_stopped

MODEL = "{model}"
"""Stands for the model's folder in the command."""
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.2
_TAIL_LINES, _TAIL_CHARACTERS = 3, 400


def server_command(template: str, model: Path) -> list[str]:
    """The words of `template` with the model's folder in place of {model}. Raises UserError."""
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UserError(f"--serve {template}: {str(error).lower()}; check the quotes") from error
    if not any(MODEL in word for word in words):
        raise UserError(f"--serve {template}: write {MODEL} where the model's folder belongs")
    return [word.replace(MODEL, str(model.resolve())) for word in words]


@contextlib.contextmanager
def serving(
    children: Children, command: list[str], base_urls: Sequence[str], log: Path, timeout: float
) -> Iterator[Callable[[], None]]:
    """What `command` starts runs and answers at every URL inside the `with` block, and is gone after it.

    Yields a function that raises StageFailure as soon as the command has ended. What it prints is appended to `log`;
    `timeout`: seconds from its start to the first answer of each.

    Raises:
        UserError: something else answers at a URL, which would be asked in its place; or no answer in time.
        StageFailure: the command ended.
        Stopped: the loop is to stop.
    """
    waiting = [HttpClient(base_url, timeout=10.0, retries=0) for base_url in base_urls]
    for client in waiting:
        if _is_taken(client.base_url):
            raise UserError(
                f"{client.base_url}: something is there already; end it, or give --serve and --base-url a port"
            )
    with open(log, "ab") as output:
        begin = output.tell()
        server = children.start(command, output)

    def check() -> None:
        status = server.poll()
        if status is not None:
            said = _tail(log, begin)
            raise StageFailure(
                f"the server ended with status {status}{f': {said}' if said else ''} (all of it: {log})",
                128 - status if status < 0 else status or 1,
            )

    try:
        deadline = time.monotonic() + timeout
        while waiting:
            check()
            raise_if_stopped(children.stop, "while the server started")
            try:
                waiting[0].get("/models")
                waiting.pop(0)
                continue
            except UserError as error:
                if time.monotonic() > deadline:
                    said, reason = _tail(log, begin), str(error).partition(" (1 attempts)")[0]
                    raise UserError(
                        f"{reason} for {timeout:g} s{f'; the server said: {said}' if said else ''} (all of it: {log}); "
                        "a longer --serve-timeout may help"
                    ) from error
            time.sleep(_POLL_SECONDS)
        yield check
    finally:
        end(server, _GRACE_SECONDS)


def _is_taken(base_url: str) -> bool:
    """Whether somebody listens there."""
    parts = urllib.parse.urlsplit(base_url)
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True


def _tail(log: Path, begin: int) -> str:
    """The last words of a log from byte `begin` on, in one line."""
    with open(log, "rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", "replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]
