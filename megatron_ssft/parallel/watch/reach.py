"""Whether a store listens at an address, within a time limit.

torch says so in pages of stack traces, after up to three times the limit, or waits for ever where another program
listens and says nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from typing import TypeVar

T = TypeVar("T")
_ATTEMPT_SECONDS = 10.0
_PAUSE_SECONDS = 1.0
_STDERR = 2


class Unreachable(Exception):
    """Nothing answered in time; its text says why, for a person."""


def await_listener(address: str, port: int, seconds: float) -> None:
    """Return once a connection to the port is taken; it is closed again. Raises Unreachable after `seconds`.

    Whoever comes first waits for the listener to come, and for its name to be known.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(0.1, min(_ATTEMPT_SECONDS, left))):
                return
        except socket.gaierror as error:
            reason = f"the name is not known here ({error.strerror})"
        except UnicodeError:  # as of a label of more than 63 letters
            raise Unreachable("this is no name of a host") from None
        except TimeoutError:
            reason = "no answer, as behind a firewall or from a host that is down"
        except ConnectionRefusedError:
            reason = "nothing listens at that port"
        except OSError as error:
            reason = error.strerror or str(error)
        pause = _PAUSE_SECONDS * random.uniform(0.5, 1.5)  # a thousand ranks do not come at once
        if time.monotonic() + pause > deadline:
            raise Unreachable(reason)
        time.sleep(pause)


def within(seconds: float, connect: Callable[[], T]) -> T:
    """What `connect` returns or raises. Raises Unreachable where it takes longer; it is then left alone."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(connect())
        except Exception as error:  # noqa: BLE001 - raised again by `result`
            outcome.set_exception(error)

    threading.Thread(target=run, name="connect", daemon=True).start()
    try:
        return outcome.result(seconds)
    except NotDone:
        raise Unreachable("something listens there that gives no answer") from None


@contextlib.contextmanager
def quiet_unless_done() -> Iterator[None]:
    """Hold back what is written to standard error inside the `with` block; drop it where the block raises.

    It comes from C++, below Python's own streams. The error itself says what is wrong.
    """
    try:
        real = os.dup(_STDERR)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(real, _STDERR)
            os.close(real)
        held.seek(0)
        if text := held.read():
            os.write(_STDERR, text)
