"""One HTTP request and its response, within a time by the clock.

The timeouts of sockets bound single waits: a server that sends a byte now and then is never late, and neither looking
up a name nor trying its addresses in turn has one limit. So the exchange runs in a thread of its own, and who waits for
it looks at the clock.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

_MAX_TEXT = 300


class BadStatus(Exception):
    """A status of 300 or more."""

    def __init__(self, code: int, text: str, retry_after: float) -> None:
        super().__init__(f"status {code}: {text}")
        self.code, self.text = code, text
        self.retry_after = retry_after
        """Seconds the server asks to wait; 0 where it does not, or gives a date."""


class Exchange:
    """A request that is sent once: GET without a body, POST with one."""

    def __init__(
        self, url: str, body: bytes | None, headers: Mapping[str, str], proxies: dict[str, str] | None
    ) -> None:
        """`proxies`: those of the environment where None."""
        self._request = urllib.request.Request(url, data=body, headers=dict(headers))
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), _PlainHandler(self), _TLSHandler(self)
        )
        self._over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._late = False
        self._outcome: bytes | Exception = TimeoutError()

    def run(self, seconds: float) -> bytes:
        """Return the response's body.

        Raises TimeoutError after `seconds`, BadStatus, OSError (URLError without a connection), HTTPException.
        """
        # A daemon: an answer that is still awaited when the program gives up must not keep it alive.
        threading.Thread(target=self._exchange, args=(seconds,), daemon=True).start()
        if not self._over.wait(seconds):
            self._late = True
            self._hang_up()
            raise TimeoutError
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def watch(self, connection: socket.socket) -> None:
        """Take note of a connection that this exchange made."""
        self._sockets.append(connection)
        if self._late:
            self._hang_up()

    def _exchange(self, seconds: float) -> None:
        try:
            with self._opener.open(self._request, timeout=seconds) as response:
                self._outcome = response.read()
        except urllib.error.HTTPError as error:
            self._outcome = BadStatus(error.code, _message(error), _retry_after(error))
        except urllib.error.URLError as error:
            self._outcome = error.reason if isinstance(error.reason, TimeoutError) else error
        except Exception as error:  # noqa: BLE001  raised again where it is waited for
            self._outcome = error
        self._over.set()

    def _hang_up(self) -> None:
        """End the thread's waits, and tell the server that nobody listens."""
        for connection in self._sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already


class _PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        exchange = self._exchange

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                exchange.watch(self.sock)

        return self.do_open(Connection, req)


class _TLSHandler(urllib.request.HTTPSHandler):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        exchange = self._exchange

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                exchange.watch(self.sock)

        return self.do_open(Connection, req)


def _message(error: urllib.error.HTTPError) -> str:
    """Read what the server says, in one line."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return " ".join(text.split())[:_MAX_TEXT] or str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return float(error.headers.get("Retry-After") or 0)
    except ValueError:
        return 0.0
