"""Several servers of one model, asked as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from megatron_ssft.errors import UserError
from megatron_ssft.generation.asking import ask_all
from megatron_ssft.generation.backend import Until
from megatron_ssft.generation.openai_backend import OpenAIBackend
from megatron_ssft.generation.requests import Failed, Generated, Origin, Request


class OpenAIServers:
    """Gives each request to a server that is free. Which one answers shapes no sample: each has a seed of its own."""

    def __init__(self, servers: Sequence[OpenAIBackend], log: Callable[[str], None]) -> None:
        """Raises UserError for servers whose samples would differ."""
        self._servers, self._log = servers, log
        for server in servers[1:]:
            if server.origin != servers[0].origin:
                raise UserError(
                    f"{server.url} differs from {servers[0].url}: {server.origin} and {servers[0].origin}; samples of "
                    "one file have one origin: start all servers alike"
                )

    @property
    def origin(self) -> Origin:
        """Name what shapes the samples besides the sampling settings."""
        return self._servers[0].origin

    @property
    def chunk_size(self) -> int:
        """Questions that are worth handing over together."""
        return sum(server.chunk_size for server in self._servers)

    def load(self) -> None:
        """Nothing: the servers have the model."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated | Failed]:
        """Yield the samples in the order in which the servers answer. Raises UserError."""
        self._servers[0].check_prompts(requests)
        yield from self._ask_all(requests, self._servers[0].temperature)

    def greedy(self, requests: Sequence[Request], until: Until) -> Mapping[str, tuple[int, ...] | Failed]:
        """Map questions to greedy tokens up to where `until` became true of them."""
        return self._servers[0].starts(self._ask_all(requests, 0.0), until)

    def _ask_all(self, requests: Sequence[Request], temperature: float) -> Iterator[Generated | Failed]:
        servers = [server for server in self._servers if not server.has_given_up]
        return ask_all(servers, requests, temperature, self._log)
