"""OpenAI's completions protocol as servers speak it: what is sent in each dialect, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from megatron_ssft.generation.http_client import NoResult
from megatron_ssft.generation.requests import FINISH_REASONS, FinishReason, Sampling

_SHOWN = 200
"""Characters of a wrong answer that a message shows."""


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
    logit_bias: dict[str, float] | UnsetType = UNSET
    """Token id -> what is added to its logit."""
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

    choices: list[Choice]
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
    keeps_special: bool = False
    """Special tokens are asked for in the text."""


_EXTENDED = Dialect("token ids, extended", True, extended=True, keeps_special=True)
_CONFIGURED = Dialect("text, with a generation configuration", False, configured=True)
_IDS, _TEXT = Dialect("token ids", True), Dialect("text", False)
DIALECTS = (_EXTENDED, _IDS, _CONFIGURED, _TEXT)
KEEPING_DIALECTS = (
    _EXTENDED,
    Dialect("token ids, special tokens kept", True, keeps_special=True),
    Dialect("text, special tokens kept", False, keeps_special=True),
    *DIALECTS[1:],
)
"""DIALECTS for answers in which special tokens must be seen."""


def completion_body(
    dialect: Dialect,
    prompt: list[int] | str,
    *,
    model: str,
    sampling: Sampling,
    temperature: float,
    max_tokens: int,
    seed: int,
    stop_ids: Sequence[int],
) -> CompletionBody:
    """Spell one request. `stop_ids`: any of them ends the sample."""
    body = CompletionBody(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_p=sampling.top_p, seed=seed
    )
    stops = sorted(stop_ids)
    if dialect.keeps_special:
        body.skip_special_tokens = False
    if dialect.extended:
        # Spelled out, because vLLM takes what is missing from the model's generation_config.json.
        body.top_k, body.min_p, body.repetition_penalty = sampling.top_k or -1, 0.0, 1.0
        body.stop_token_ids, body.return_token_ids = stops, True
    elif dialect.configured:
        configuration = GenerationConfiguration(
            do_sample=temperature > 0, max_new_tokens=max_tokens, eos_token_id=stops, pad_token_id=stops[0]
        )
        if temperature > 0:
            configuration.temperature = temperature
            configuration.top_p, configuration.top_k = sampling.top_p, sampling.top_k
        body.generation_config = json.dumps(msgspec.to_builtins(configuration))
    return body


def read_completion(answer: dict[str, Any]) -> Completion:
    """Read an answer of status 200. Raises NoResult unless it is one finished sample.

    Servers answer so too when they give up: by an error object, no choice, or a finish_reason such as abort, error,
    repetition, content_filter or null, whose text is not the model's.
    """
    if answer.get("error") or answer.get("object") == "error":
        raise NoResult(f"an error under status 200: {_shown(answer.get('error') or answer.get('message') or answer)}")
    choices = answer.get("choices")
    if not isinstance(choices, list):
        raise NoResult(f"no usable completion: {_shown(answer)}")
    if len(choices) != 1:
        raise NoResult(f"{len(choices)} choices instead of one")
    reason = choices[0].get("finish_reason") if isinstance(choices[0], dict) else None
    if isinstance(choices[0], dict) and "finish_reason" in choices[0] and reason not in FINISH_REASONS:
        raise NoResult(f"finish_reason {_shown(reason)}")
    try:
        return msgspec.convert(answer, Completion)
    except msgspec.ValidationError as error:
        raise NoResult(f"no usable completion: {_shown(answer)}") from error


def _shown(value: object) -> str:
    """The value in one short line."""
    return " ".join(json.dumps(value).split())[:_SHOWN]
