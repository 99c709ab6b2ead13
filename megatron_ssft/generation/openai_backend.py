"""Generation by a running server that speaks OpenAI's completions protocol: vLLM, SGLang, transformers serve.

Servers differ in what they take. A first request finds out, in this order: token ids with the extensions of vLLM and
SGLang (ids come back too), plain token ids, text with a generation configuration (transformers serve), plain text.
Each sample is a request with a seed of its own: with `n` samples per request, the server chooses the seeds of all but
the first. Servers with a prefix cache compute the prompt once all the same.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_ssft.errors import UserError
from megatron_ssft.generation.backend import Until, shortest_start
from megatron_ssft.generation.http_client import HttpClient, Refused
from megatron_ssft.generation.model_folder import ModelFolder
from megatron_ssft.generation.requests import FinishReason, Generated, Origin, Request, Sampling
from megatron_ssft.tokenizers.tokenizer import Tokenizer


class CompletionBody(Struct, kw_only=True):
    """What is sent; fields that a dialect does not know stay out."""

    model: str
    prompt: list[int] | str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    top_k: int | UnsetType = UNSET
    min_p: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    stop_token_ids: list[int] | UnsetType = UNSET
    skip_special_tokens: bool | UnsetType = UNSET
    return_token_ids: bool | UnsetType = UNSET
    generation_config: str | UnsetType = UNSET
    """A `GenerationConfiguration` as JSON."""


class GenerationConfiguration(Struct, kw_only=True):
    """transformers serve's field."""

    do_sample: bool
    max_new_tokens: int
    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    eos_token_id: list[int]
    pad_token_id: int


class Choice(Struct):
    """A generated text."""

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] | None = None


class Usage(Struct):
    """What the server counted."""

    prompt_tokens: int | None = None


class Completion(Struct):
    """What comes back."""

    choices: Annotated[list[Choice], Meta(min_length=1, max_length=1)]
    usage: Usage | None = None


@dataclass(frozen=True)
class Dialect:
    """A way to ask."""

    name: str
    sends_ids: bool
    extended: bool = False
    """vLLM's and SGLang's fields."""
    configured: bool = False
    """transformers serve's field."""


DIALECTS = (
    Dialect("token ids, extended", True, extended=True),
    Dialect("token ids", True),
    Dialect("text, with a generation configuration", False, configured=True),
    Dialect("text", False),
)


class OpenAIBackend:
    """Asks the server what it is at construction."""

    def __init__(
        self,
        model: ModelFolder,
        sampling: Sampling,
        client: HttpClient,
        *,
        served_model: str | None,
        concurrency: int,
        log: Callable[[str], None],
    ) -> None:
        """`model`: the folder the server has loaded; its tokenizer is used here. Raises UserError."""
        self._model, self._sampling, self._client, self._concurrency = model, sampling, client, concurrency
        self._served_model = _choose_model(client, served_model, log)
        self._dialect, self._returns_ids = self._find_dialect()
        kind = "its own token ids" if self._returns_ids else "text, tokenized again here"
        log(f"{client.base_url}: model {self._served_model}; prompts as {self._dialect.name}; answers as {kind}")
        if not (self._dialect.extended or self._dialect.configured):
            if sampling.top_k:
                raise UserError(f"--top-k {sampling.top_k}: {client.base_url} does not take it; leave it out")
            log("what the protocol does not name (top-k, penalties, stop tokens) is left to the server's defaults")

    @property
    def origin(self) -> Origin:
        """Name what shapes the samples besides the sampling settings."""
        return {
            "backend": "openai",
            "served_model": self._served_model,
            "token_ids": "server" if self._returns_ids else "tokenized again",
        }

    @property
    def chunk_size(self) -> int:
        """Questions that are worth handing over together."""
        return 8 * self._concurrency

    def load(self) -> None:
        """Nothing: the server has the model."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Yield the samples in the order in which the server answers. Raises UserError."""
        if not self._dialect.sends_ids:
            for request in requests:
                self._prompt_text(request)  # refused before the server works
        yield from self._ask_all(requests, self._sampling.temperature)

    def greedy(self, requests: Sequence[Request], until: Until) -> dict[str, tuple[int, ...]]:
        """Map questions to greedy tokens up to where `until` became true of them."""
        starts = {}
        for done in self._ask_all(requests, 0.0):
            ids = done.token_ids
            if ids is None:
                ids = tuple(self._model.tokenizer.encode(done.text))
            start = shortest_start(ids, until)
            if start is not None:
                starts[done.request.id] = start
        return starts

    def _ask_all(self, requests: Sequence[Request], temperature: float) -> Iterator[Generated]:
        """Yield the answers as they come, `concurrency` questions under way at a time."""
        over = threading.Event()
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        done: queue.SimpleQueue[Generated | Exception] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)

        def work() -> None:
            while not over.is_set():
                try:
                    done.put(self._ask(waiting.get_nowait(), temperature))
                except queue.Empty:
                    return
                except Exception as error:  # noqa: BLE001  raised again where it is looked at
                    done.put(error)
                    return

        for _ in range(min(self._concurrency, len(requests))):
            # Daemons: an answer that is still awaited when the program gives up must not keep it alive.
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in requests:
                result = done.get()
                if isinstance(result, Exception):
                    self._client.stopped.set()
                    raise result
                yield result
        finally:
            over.set()

    def _ask(self, request: Request, temperature: float) -> Generated:
        answer = self._client.post("/completions", self._body(self._dialect, request, temperature, request.limit))
        choice = self._choice(answer, request)
        if self._returns_ids and choice.token_ids is None:
            raise UserError(f"{self._client.base_url}: token ids came with some answers and not with others")
        return Generated(request, choice.token_ids, choice.finish_reason, choice.text)

    def _choice(self, answer: dict[str, Any], request: Request) -> Choice:
        """Read the only choice. Raises UserError for answers of another shape."""
        try:
            completion = msgspec.convert(answer, Completion)
        except msgspec.ValidationError as error:
            shape = " ".join(json.dumps(answer).split())[:200]
            raise UserError(f"{self._client.base_url}: no usable completion: {shape}; look at the server") from error
        prompt_tokens = None if completion.usage is None else completion.usage.prompt_tokens
        expected = len(request.prompt) + len(request.start)
        if prompt_tokens is not None and prompt_tokens != expected:
            raise UserError(
                f"{self._client.base_url}: the prompt of question {request.id!r} is {prompt_tokens} tokens there and "
                f"{expected} here; does the server have the model in {self._model.path}?"
            )
        return completion.choices[0]

    def _body(self, dialect: Dialect, request: Request, temperature: float, max_tokens: int) -> CompletionBody:
        settings = self._sampling
        body = CompletionBody(
            model=self._served_model,
            prompt=[*request.prompt, *request.start] if dialect.sends_ids else self._prompt_text(request),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=settings.top_p,
            seed=request.seed,
        )
        stop_ids = sorted(self._model.stop_ids)
        if dialect.extended:
            # Spelled out, because vLLM takes what is missing from the model's generation_config.json.
            body.top_k, body.min_p, body.repetition_penalty = settings.top_k or -1, 0.0, 1.0
            body.stop_token_ids, body.skip_special_tokens, body.return_token_ids = stop_ids, False, True
        elif dialect.configured:
            configuration = GenerationConfiguration(
                do_sample=temperature > 0, max_new_tokens=max_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
            )
            if temperature > 0:
                configuration.temperature = temperature
                configuration.top_p, configuration.top_k = settings.top_p, settings.top_k
            body.generation_config = json.dumps(msgspec.to_builtins(configuration))
        return body

    def _prompt_text(self, request: Request) -> str:
        """Spell the prompt so that a server makes these very ids of it. Raises UserError."""
        text = text_of((*request.prompt, *request.start), self._model.tokenizer)
        if text is None:
            raise UserError(
                f"question {request.id!r}: the text of its prompt does not give the same tokens again, and "
                f"{self._client.base_url} takes no token ids; use --backend hf or a server that takes them"
            )
        return text

    def _find_dialect(self) -> tuple[Dialect, bool]:
        """Find out how the server wants to be asked, and whether it answers in token ids. Raises UserError."""
        tokenizer = self._model.tokenizer
        ids = tuple(tokenizer.encode("1 + 1 = 2"))
        ids = ids if tokenizer.bos_id is None else (tokenizer.bos_id, *ids)
        request = Request("probe", ids, (), None, 0, 1, 1)
        refusals = []
        for dialect in DIALECTS:
            try:
                answer = self._client.post("/completions", self._body(dialect, request, 0.0, 1))
            except Refused as error:
                refusals.append(str(error))
                continue
            return dialect, self._choice(answer, request).token_ids is not None
        raise UserError(f"no way of asking was accepted; the last answer: {refusals[-1]}")


def text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """Spell `ids` as the text of which servers make them; None if there is none.

    Servers add the begin-of-text token themselves.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if list(ids[: len(begin)]) != begin:
        return None
    text = tokenizer.decode(ids[len(begin) :])
    return text if [*begin, *tokenizer.encode(text)] == list(ids) else None


def _choose_model(client: HttpClient, served_model: str | None, log: Callable[[str], None]) -> str:
    """Choose the name to ask for. Raises UserError where the server has several and none was named."""
    try:
        listed = client.get("/models", retries=None if served_model is None else 0).get("data")
    except UserError as error:
        if served_model is None:
            raise UserError(f"{error}; or name the model by --served-model") from error
        listed = None
    names = [row["id"] for row in listed if isinstance(row, dict) and "id" in row] if isinstance(listed, list) else []
    if served_model is not None:
        if served_model not in names:
            log(f"{client.base_url} does not list {served_model}; asking for it all the same")
        return served_model
    if len(names) != 1:
        listing = ", ".join(map(str, names[:5])) or "none"
        raise UserError(f"{client.base_url} serves these models: {listing}; choose one by --served-model")
    return names[0]
