"""Generation by a running server that speaks OpenAI's completions protocol: vLLM, SGLang, transformers serve.

Servers differ in what they take. A first request finds out, in this order: token ids with the extensions of vLLM and
SGLang (ids come back too), plain token ids, text with a generation configuration (transformers serve), plain text.
Each sample is a request with a seed of its own: with `n` samples per request, the server chooses the seeds of all but
the first. Servers with a prefix cache compute the prompt once all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_ssft.errors import UserError
from megatron_ssft.generation.asking import ask_all
from megatron_ssft.generation.backend import Until, shortest_start
from megatron_ssft.generation.http_client import HttpClient, Refused, RequestFailed, Unusable
from megatron_ssft.generation.model_folder import ModelFolder
from megatron_ssft.generation.openai_protocol import (
    DIALECTS,
    KEEPING_DIALECTS,
    Choice,
    CompletionBody,
    Dialect,
    completion_body,
    read_completion,
)
from megatron_ssft.generation.own_tags import OwnTags
from megatron_ssft.generation.requests import Failed, Generated, Origin, Request, Sampling
from megatron_ssft.tokenizers.tokenizer import Tokenizer

COMPLETIONS = "/completions"
REFUSED_REQUESTS = (400, 409, 413, 422, 451)
"""Statuses that speak of one request; others below 500, but for those that pass, are about all of them."""


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
        seeks_tags: bool = False,
    ) -> None:
        """`model`: the folder the server has loaded; its tokenizer is used here.

        `seeks_tags`: which tag the model writes is to be read from the answers. Raises UserError, for a server whose
        answers do not tell it as well.
        """
        self._model, self._sampling, self._client, self._log = model, sampling, client, log
        self.concurrency = concurrency
        self._own = OwnTags(model.tags, model.tokenizer) if model.tags is not None else None
        self._answered = 0
        self._served_model = _choose_model(client, served_model, log)
        lost_tags = self._own.lost_in_text() if seeks_tags and self._own is not None else []
        self._dialect, self._returns_ids = self._find_dialect(KEEPING_DIALECTS if lost_tags else DIALECTS)
        kind = "its own token ids" if self._returns_ids else "text, tokenized again here"
        log(f"{client.base_url}: model {self._served_model}; prompts as {self._dialect.name}; answers as {kind}")
        # After the attempts of a sample those of a probe may follow, which says whether the server is there.
        log(f"every request ends within {_duration(2 * client.longest)}; what failed until then is noted")
        if not (self._dialect.extended or self._dialect.configured):
            if sampling.top_k:
                raise UserError(f"--top-k {sampling.top_k}: {client.base_url} does not take it; leave it out")
            log("what the protocol does not name (top-k, penalties, stop tokens) is left to the server's defaults")
        if lost_tags and not self._returns_ids:
            self._check_tags_show(lost_tags)

    @property
    def url(self) -> str:
        return self._client.base_url

    @property
    def temperature(self) -> float:
        return self._sampling.temperature

    @property
    def has_given_up(self) -> bool:
        """Whether it waits for nothing any more."""
        return self._client.stopped.is_set()

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
        return 8 * self.concurrency

    def load(self) -> None:
        """Nothing: the server has the model."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated | Failed]:
        """Yield the samples in the order in which the server answers. Raises UserError."""
        self.check_prompts(requests)
        yield from self._ask_all(requests, self._sampling.temperature)

    def greedy(self, requests: Sequence[Request], until: Until) -> Mapping[str, tuple[int, ...] | Failed]:
        """Map questions to greedy tokens up to where `until` became true of them."""
        return self.starts(self._ask_all(requests, 0.0), until)

    def check_prompts(self, requests: Sequence[Request]) -> None:
        """Refuse, before the server works, a prompt that it cannot be given. Raises UserError."""
        if not self._dialect.sends_ids:
            for request in requests:
                self._prompt_text(request)

    def starts(self, samples: Iterable[Generated | Failed], until: Until) -> dict[str, tuple[int, ...] | Failed]:
        """Map questions to the tokens of their samples up to where `until` became true of them."""
        starts: dict[str, tuple[int, ...] | Failed] = {}
        for done in samples:
            if isinstance(done, Failed):
                starts[done.request.id] = done
                continue
            ids = done.token_ids
            if ids is None:
                assert self._own is not None  # nothing else is looked for than a tag
                ids = self._own.ids_of_text(done.text)
            start = shortest_start(ids, until)
            if start is not None:
                starts[done.request.id] = start
        return starts

    def _ask_all(self, requests: Sequence[Request], temperature: float) -> Iterator[Generated | Failed]:
        return ask_all([self], requests, temperature, self._log)

    def give_up(self) -> None:
        """Try nothing again any more."""
        self._client.stopped.set()

    def ask(self, request: Request, temperature: float) -> Generated | Failed:
        """Get one sample, or the reason why there is none. Raises RequestFailed where the server gives nobody any."""
        before = self._answered
        body = self._body(self._dialect, request, temperature, request.limit)
        try:
            choice = self._client.post(COMPLETIONS, body, lambda answer: self._choice(answer, request))
        except Unusable as error:
            return Failed(request, error.problem)
        except RequestFailed as error:
            if isinstance(error, Refused) and error.code not in REFUSED_REQUESTS:
                raise
            if self._answered == before and not self._answers():
                raise
            return Failed(request, error.problem)
        if self._returns_ids and choice.token_ids is None:
            raise UserError(f"{self._client.base_url}: token ids came with some answers and not with others")
        self._answered += 1  # threads may lose each other's counts, but not all of them
        return Generated(request, choice.token_ids, choice.finish_reason, choice.text)

    def _answers(self) -> bool:
        """Whether the server answers a request that it has answered before, so that only another one is to blame."""
        probe = self._probe()
        try:
            self._client.post(COMPLETIONS, self._body(self._dialect, probe, 0.0, 1), read_completion)
        except RequestFailed:
            return False
        return True

    def _choice(self, answer: dict[str, Any], request: Request) -> Choice:
        """Read the only choice. Raises NoResult; UserError for another model's count of the prompt."""
        completion = read_completion(answer)
        prompt_tokens = None if completion.usage is None else completion.usage.prompt_tokens
        expected = len(request.prompt) + len(request.start)
        if prompt_tokens is not None and prompt_tokens != expected:
            raise UserError(
                f"{self._client.base_url}: the prompt of question {request.id!r} is {prompt_tokens} tokens there and "
                f"{expected} here; does the server have the model in {self._model.path}?"
            )
        return completion.choices[0]

    def _body(self, dialect: Dialect, request: Request, temperature: float, max_tokens: int) -> CompletionBody:
        return completion_body(
            dialect,
            [*request.prompt, *request.start] if dialect.sends_ids else self._prompt_text(request),
            model=self._served_model,
            sampling=self._sampling,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=request.seed,
            stop_ids=sorted(self._model.stop_ids),
        )

    def _prompt_text(self, request: Request) -> str:
        """Spell the prompt so that a server makes these very ids of it. Raises UserError."""
        text = text_of((*request.prompt, *request.start), self._model.tokenizer)
        if text is None:
            raise UserError(
                f"question {request.id!r}: the text of its prompt does not give the same tokens again (a tag or "
                f"another control token that a question spells would become one), and {self._client.base_url} takes "
                "no token ids; use --backend hf or a server that takes them"
            )
        return text

    def _probe(self) -> Request:
        """A short request that belongs to no question."""
        tokenizer = self._model.tokenizer
        ids = tuple(tokenizer.encode("1 + 1 = 2"))
        ids = ids if tokenizer.bos_id is None else (tokenizer.bos_id, *ids)
        return Request("probe", ids, (), None, 0, 1, 1)

    def _find_dialect(self, dialects: Sequence[Dialect]) -> tuple[Dialect, bool]:
        """Find out how the server wants to be asked, and whether it answers in token ids. Raises UserError."""
        request, refusals = self._probe(), list[RequestFailed]()
        for dialect in dialects:
            body = self._body(dialect, request, 0.0, 1)
            try:
                choice = self._client.post(COMPLETIONS, body, lambda answer: self._choice(answer, request))
            except (Refused, Unusable) as error:  # some refuse under status 200
                refusals.append(error)
                continue
            return dialect, choice.token_ids is not None
        raise UserError(f"no way of asking was accepted; the last answer: {refusals[-1]}")

    def _check_tags_show(self, tags: Sequence[int]) -> None:
        """Raise UserError unless the server's text shows `tags`, special tokens that servers leave out in general.

        The server is made to write one.
        """
        assert self._model.tags is not None and self._own is not None  # there are `tags`
        ids, shown = self._model.tags.ids[tags[0]], False
        if len(ids) == 1:
            body = self._body(self._dialect, self._probe(), 0.0, 1)
            body.logit_bias = {str(ids[0]): 100.0}
            try:
                text = self._client.post(COMPLETIONS, body, read_completion).choices[0].text
                shown = self._own.split_text(text)[0] == tags[0]
            except (Refused, Unusable):
                shown = False
        if not shown:
            raise UserError(
                f"--tags own and own-greedy: {self._client.base_url} answers with text and leaves the special token "
                f"{self._model.tags.strings[tags[0]]!r} out of it, so the model's choice cannot be seen; use a server "
                "that returns token ids (vLLM does), or --backend hf"
            )


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


def _duration(seconds: float) -> str:
    """`90 s`, `6 h 2 min`."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
