"""JSON over HTTP with patience: what may pass is tried again, what cannot is said in one line.

Every wait has an end. An attempt ends after `timeout` seconds by the clock, whatever it waits for: the name, the
connection, the first byte or the last one.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from megatron_ssft.errors import UserError
from megatron_ssft.generation.http_exchange import BadStatus, Exchange

Answer = TypeVar("Answer")

_LOCAL = ("localhost", "127.0.0.1", "::1")
MAX_DELAY = 30.0
"""Most seconds between two attempts."""
LONGEST_TIMEOUT = 1e7
"""Seconds, a third of a year: beyond that the clock's own limits are near."""


class RequestFailed(UserError):
    """A request that got no answer of use; `problem` says why, without the server's address."""

    def __init__(self, where: str, problem: str, advice: str = "") -> None:
        super().__init__(f"{where}: {problem}{advice}")
        self.problem = problem


class Refused(RequestFailed):
    """The server understood and declined (a status of 400-499): asking again will not help."""

    def __init__(self, where: str, problem: str, code: int) -> None:
        super().__init__(where, problem)
        self.code = code


class Unanswered(RequestFailed):
    """No attempt brought an answer: no connection, 429, 500-599, cut off, or too slow."""


class Unusable(RequestFailed):
    """The server answers, but every attempt ended with what is no result."""


class NoResult(ValueError):
    """What a reader raises for an answer that is no result; another attempt may bring one."""


@dataclass
class HttpClient:
    """One server. Threads may share it."""

    base_url: str
    """Up to and including /v1; added where it is missing."""
    timeout: float
    """Seconds of one attempt, by the clock, from looking up the name to the last byte."""
    retries: int
    """Further attempts after 408, 429, 500-599, timeouts, lost connections and answers that are no result."""
    first_delay: float = 0.5
    """Seconds before the first further attempt; doubled each time up to MAX_DELAY, unless the server says how long."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Once set, nothing is tried again."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--base-url {self.base_url}: expected something like http://localhost:8000/v1")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(f"--timeout {self.timeout:g}: must be above 0 and at most {LONGEST_TIMEOUT:g} seconds")
        self.base_url = self.base_url.rstrip("/")
        if not self.base_url.endswith("/v1"):
            self.base_url += "/v1"
        # A proxy for the outside world does not know this machine's own servers.
        self._proxies: dict[str, str] | None = {} if parts.hostname in _LOCAL else None

    @property
    def longest(self) -> float:
        """Most seconds that a request takes with all its attempts and the waits between them."""
        return (1 + self.retries) * self.timeout + self.retries * MAX_DELAY

    def get(self, path: str, retries: int | None = None) -> dict[str, Any]:
        """Get the JSON object at `path`. Raises Refused, Unanswered."""
        return self._patiently(path, None, self.retries if retries is None else retries, lambda answer: answer)

    def post(self, path: str, body: msgspec.Struct, read: Callable[[dict[str, Any]], Answer]) -> Answer:
        """Send `body` and return what `read` makes of the answer, a JSON object.

        `read` raises NoResult for an answer that is to be tried again, UserError for one that ends it all. Raises
        Refused, Unanswered, Unusable.
        """
        data = json.dumps(msgspec.to_builtins(body)).encode("ascii")
        return self._patiently(path, data, self.retries, read)

    def _patiently(
        self, path: str, body: bytes | None, retries: int, read: Callable[[dict[str, Any]], Answer]
    ) -> Answer:
        where, delay = self.base_url + path, self.first_delay
        for attempt in range(1 + retries):
            wait = delay
            kind: type[RequestFailed] = Unanswered
            try:
                return read(_json_object(self._once(where, body)))
            except UserError:  # from `read`
                raise
            except BadStatus as error:
                problem = f"status {error.code}: {error.text}"
                if error.code < 500 and error.code not in (408, 429):
                    raise Refused(where, problem, error.code) from error
                wait = max(wait, error.retry_after)
            except NoResult as error:
                kind, problem = Unusable, str(error)
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except urllib.error.URLError as error:
                problem = f"no connection: {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                problem = f"the connection broke: {error or type(error).__name__}"
            except (ValueError, RecursionError) as error:
                problem = f"an answer that is not a JSON object: {error}"
            if attempt == retries or self.stopped.wait(min(wait, MAX_DELAY)):
                break
            delay *= 2
        raise kind(where, problem, f" ({attempt + 1} attempts); start again to go on")

    def _once(self, where: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        return Exchange(where, body, headers, self._proxies).run(self.timeout)


def _json_object(data: bytes) -> dict[str, Any]:
    """Raises ValueError, RecursionError."""
    answer = json.loads(data.decode("utf-8"))
    if not isinstance(answer, dict):
        raise ValueError(f"a {type(answer).__name__}")
    return answer
