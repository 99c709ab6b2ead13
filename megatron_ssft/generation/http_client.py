"""JSON over HTTP with patience: what may pass is tried again, what cannot is said in one line."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megatron_ssft.errors import UserError

_LOCAL = ("localhost", "127.0.0.1", "::1")
_MAX_DELAY = 30.0


class Refused(UserError):
    """The server understood and declined (a status of 400-499): asking again will not help."""


@dataclass
class HttpClient:
    """One server. Threads may share it."""

    base_url: str
    """Up to and including /v1; added where it is missing."""
    timeout: float
    """Seconds to wait for an answer."""
    retries: int
    """Further attempts after 408, 429, 500-599, timeouts, lost connections and answers that are not JSON."""
    first_delay: float = 0.5
    """Seconds before the first further attempt; doubled each time, unless the server says how long."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Once set, nothing is tried again."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--base-url {self.base_url}: expected something like http://localhost:8000/v1")
        self.base_url = self.base_url.rstrip("/")
        if not self.base_url.endswith("/v1"):
            self.base_url += "/v1"
        # A proxy for the outside world does not know this machine's own servers.
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL else []
        self._opener = urllib.request.build_opener(*proxies)

    def get(self, path: str, retries: int | None = None) -> dict[str, Any]:
        """Get the JSON object at `path`. Raises Refused, UserError."""
        return self._patiently(path, None, self.retries if retries is None else retries)

    def post(self, path: str, body: msgspec.Struct) -> dict[str, Any]:
        """Send `body` and get the answer, a JSON object. Raises Refused, UserError."""
        return self._patiently(path, json.dumps(msgspec.to_builtins(body)).encode("ascii"), self.retries)

    def _patiently(self, path: str, body: bytes | None, retries: int) -> dict[str, Any]:
        delay = self.first_delay
        for attempt in range(1 + retries):
            problem, wait = "", delay
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_message(error)}"
                if error.code < 500 and error.code not in (408, 429):
                    raise Refused(f"{self.base_url}{path}: {problem}") from error
                wait = max(wait, _retry_after(error))
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except urllib.error.URLError as error:
                problem = f"no connection: {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                problem = f"the connection broke: {error or type(error).__name__}"
            except ValueError as error:
                problem = f"an answer that is not a JSON object: {error}"
            if attempt == retries or self.stopped.wait(min(wait, _MAX_DELAY)):
                break
            delay *= 2
        raise UserError(f"{self.base_url}{path}: {problem} ({attempt + 1} attempts); start again to go on")

    def _once(self, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.base_url + path, data=body, headers=headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            answer = json.loads(response.read().decode("utf-8"))
        if not isinstance(answer, dict):
            raise ValueError(f"a {type(answer).__name__}")
        return answer


def _message(error: urllib.error.HTTPError) -> str:
    """Read what the server says, in one line."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return " ".join(text.split())[:300] or error.reason


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Read the seconds the server asks to wait; 0 where it does not, or gives a date."""
    try:
        return float(error.headers.get("Retry-After") or 0)
    except ValueError:
        return 0.0
