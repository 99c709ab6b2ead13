"""Generation by vLLM in this process: continuous batching, tensor parallelism, prompts shared by its prefix cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ssft.errors import UserError
from megatron_ssft.generation.backend import Until, shortest_start
from megatron_ssft.generation.requests import FINISH_REASONS, Failed, Generated, Origin, Request, Sampling

CHUNK = 4096
"""Requests handed over at once: what a kill costs at most."""
ATTEMPTS = 2
"""How often a request is handed over that the engine gives up. Its seed decides, so that more would bring the same."""


class VLLMBackend:
    """Loads the model at the first request. Raises UserError where vLLM is not installed."""

    def __init__(
        self,
        folder: Path,
        sampling: Sampling,
        stop_ids: frozenset[int],
        *,
        dtype: str | None = None,
        tensor_parallel_size: int = 1,
        batch_size: int | None = None,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError("--backend vllm: vLLM is not installed; pip install 'megatron-ssft[vllm]'") from error
        self._vllm = vllm
        self._folder, self._sampling, self._stop_ids = folder, sampling, stop_ids
        self._dtype, self._tensor_parallel_size = dtype or "auto", tensor_parallel_size
        self.chunk_size = batch_size or CHUNK
        self._engine: Any = None

    @property
    def origin(self) -> Origin:
        """Name what shapes the samples besides the sampling settings."""
        return {"backend": "vllm", "dtype": self._dtype}

    def load(self) -> None:
        """Start the engine, once."""
        if self._engine is None:
            self._engine = self._vllm.LLM(
                model=str(self._folder),
                dtype=self._dtype,
                tensor_parallel_size=self._tensor_parallel_size,
                enable_prefix_caching=True,
            )

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated | Failed]:
        """Yield the samples, chunk by chunk."""
        for first in range(0, len(requests), self.chunk_size):
            yield from self._complete(requests[first : first + self.chunk_size], self._sampling.temperature)

    def greedy(self, requests: Sequence[Request], until: Until) -> Mapping[str, tuple[int, ...] | Failed]:
        """Map questions to greedy tokens up to where `until` became true of them."""
        starts: dict[str, tuple[int, ...] | Failed] = {}
        for done in self._complete(requests, 0.0):
            if isinstance(done, Failed):
                starts[done.request.id] = done
                continue
            assert done.token_ids is not None  # vLLM always returns them
            start = shortest_start(done.token_ids, until)
            if start is not None:
                starts[done.request.id] = start
        return starts

    def _complete(self, requests: Sequence[Request], temperature: float) -> Iterator[Generated | Failed]:
        """Yield the results; what the engine gives up is handed over again, ATTEMPTS times in all."""
        given_up = list[Failed]()
        for _ in range(ATTEMPTS):
            given_up = []
            for done in self._hand_over(requests, temperature) if requests else ():
                if isinstance(done, Failed):
                    given_up.append(done)
                else:
                    yield done
            requests = [failed.request for failed in given_up]
        yield from given_up

    def _hand_over(self, requests: Sequence[Request], temperature: float) -> Iterator[Generated | Failed]:
        self.load()
        settings = [
            self._vllm.SamplingParams(
                temperature=temperature,
                top_p=self._sampling.top_p,
                top_k=self._sampling.top_k or -1,
                max_tokens=request.limit,
                seed=request.seed,
                stop_token_ids=sorted(self._stop_ids),
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": [*request.prompt, *request.start]} for request in requests]
        # The answers stand in the order of the prompts.
        for request, answer in zip(requests, self._engine.generate(prompts, settings, use_tqdm=False), strict=True):
            if not answer.outputs:
                yield Failed(request, "no output")
                continue
            output = answer.outputs[0]
            if output.finish_reason in FINISH_REASONS:
                yield Generated(request, tuple(output.token_ids), output.finish_reason)
            else:
                yield Failed(request, f"finish_reason {json.dumps(output.finish_reason)}")
