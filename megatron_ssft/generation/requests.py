"""Requests: one per sample, each with a seed of its own, and how its result becomes a rollout.

A sample's seed is a function of (base seed, question's id, tag slot, sample number) alone, so neither the order of the
requests, nor how they are batched, nor a restart changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, get_args

from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.data.questions import question_mark
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.formats.rollouts import Rollout, RolloutKey, mark
from megatron_ssft.generation.model_folder import ModelFolder
from megatron_ssft.generation.own_tags import OwnTags
from megatron_ssft.records import ForkingTokens, SetExample
from megatron_ssft.seeded import json_digest, whole_number

TAG_MODES = ("each", "fixed", "round-robin", "own", "own-greedy", "none")
FinishReason = Literal["stop", "length"]
FINISH_REASONS = get_args(FinishReason)
"""How a sample ends that is the model's own; with any other reason it was given up."""
FREE_MODES = ("own", "own-greedy", "none")
"""Modes that append no tag to the prompt."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """0: the most probable token."""
    top_p: float
    """In (0, 1]."""
    top_k: int
    """0: no such limit."""
    max_new_tokens: int
    """The stop token counts, and in mode `own` the tag that the model writes."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        for name, holds, must in (
            ("temperature", 0 <= self.temperature < float("inf"), "not negative"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top-k", self.top_k >= 0, "not negative (0: no limit)"),
            ("max-new-tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not holds:
                raise UserError(f"--{name} {getattr(self, name.replace('-', '_'))}: must be {must}")


@dataclass(frozen=True)
class TagPlan:
    """Which tags, and how many samples per question."""

    mode: str
    """One of TAG_MODES."""
    samples: int
    """Of each tag in mode `each`, of the question in the other modes."""
    tag: int | None = None
    """Mode `fixed`: 0-based."""

    def slots(self, num_tags: int) -> Iterator[tuple[int | None, int]]:
        """Yield (tag slot, sample number within it) of every sample of a question, in order."""
        if self.mode == "each":
            yield from ((tag, sample) for tag in range(num_tags) for sample in range(self.samples))
        elif self.mode == "round-robin":
            yield from ((i % num_tags, i // num_tags) for i in range(self.samples))
        else:
            yield from ((self.tag, sample) for sample in range(self.samples))


def plan_tags(
    mode: str, tags: ForkingTokens | None, *, tag: str | None, samples_per_tag: int | None, samples: int | None
) -> TagPlan:
    """Make the plan from the flags of these names; one sample where they say nothing.

    `tag`: a number from 0, or the text of a tag, with or without what stands around its letters. Raises UserError.
    """
    assert mode in TAG_MODES, mode
    if mode != "none" and tags is None:
        raise UserError(
            f"--tags {mode}: the folder has no forking_tokens.json; export the model again, give "
            "--num-forking-tokens N, or --tags none for a model without tags"
        )
    if (tag is not None) != (mode == "fixed"):
        raise UserError("--tags fixed and --tag go together; give both or neither")
    if samples_per_tag is not None and mode not in ("each", "fixed"):
        raise UserError(f"--samples-per-tag: --tags {mode} counts samples of a question; give --samples")
    if samples is not None and (mode == "each" or samples_per_tag is not None):
        raise UserError("--samples: with --tags each give --samples-per-tag, with --tags fixed one of the two")
    count = samples_per_tag or samples or 1
    if count < 1 or 0 in (samples_per_tag, samples):
        raise UserError(f"--samples and --samples-per-tag must be at least 1, not {samples_per_tag or samples or 0}")
    if tag is None:
        return TagPlan(mode, count)
    assert tags is not None  # with mode fixed
    return TagPlan(mode, count, _find_tag(tag, tags))


def _find_tag(text: str, tags: ForkingTokens) -> int:
    """Raises UserError."""
    if text.isdecimal():  # never taken for a part of a text: the 3 in <think3> is tag 2
        numbers = [int(text)] if int(text) < tags.num_tags else []
    else:
        numbers = [i for i, string in enumerate(tags.strings) if text and text in string]
    if len(numbers) != 1:
        choices = f"0 to {tags.num_tags - 1}, or {tags.strings[0].strip()} to {tags.strings[-1].strip()}"
        raise UserError(f"--tag {text}: no such tag; give {choices}")
    return numbers[0]


@dataclass(frozen=True)
class Request:
    """One sample to be generated."""

    id: str
    prompt: tuple[int, ...]
    """Ids up to and including the generation prompt; one object for all requests of a question."""
    start: tuple[int, ...]
    """Ids that follow the prompt: the tag, or in mode `own-greedy` what the model wrote up to its tag."""
    slot: int | None
    sample: int
    seed: int
    limit: int
    """Most tokens to generate, at least 1."""
    chosen: int | None = None
    """Mode `own-greedy`: the tag that `start` ends with."""
    question: str | None = None
    """`question_mark` of the row that asks it."""

    @property
    def key(self) -> RolloutKey:
        return self.id, self.slot, self.sample


def prompt_mark(request: Request) -> str:
    """Compute the field `prompt` of a rollout's line: it changes with the question's wording, not with the tag."""
    return mark(request.prompt)


@dataclass(frozen=True)
class Generated:
    """A backend's answer to a request."""

    request: Request
    token_ids: tuple[int, ...] | None
    """All generated tokens, the stop token among them; None where the server tells only the text."""
    finish_reason: FinishReason
    text: str = ""
    """Looked at only where `token_ids` is None."""


@dataclass(frozen=True)
class Failed:
    """What a backend gives instead of a sample that it could not make, however often it tried."""

    request: Request
    reason: str
    """One line; what stands before the first colon names the kind."""


def sample_seed(base: int, name: str, slot: int | None, sample: int) -> int:
    """Draw the seed of one sample, in [0, 2^31): every server takes numbers of that size."""
    return whole_number(json_digest(base, name, slot, sample), bits=31)


def build_requests(
    examples: Sequence[SetExample], model: ModelFolder, plan: TagPlan, sampling: Sampling, seed: int
) -> list[Request]:
    """Make every sample's request, question by question, prompts encoded as in training.

    Raises one UserError for all questions whose prompt cannot be encoded or leaves no room to generate.
    """
    tags = model.tags.ids if model.tags is not None else ()
    assert plan.mode in FREE_MODES or tags, plan
    wrong, requests = WrongRows(), list[Request]()
    for example in examples:
        try:
            prompt = tuple(encode_prompt(example, model.tokenizer))
            if not prompt:
                raise RowError(f"the tokenizer makes no token of the prompt of question {example.id!r}")
            for slot, sample in plan.slots(len(tags)):
                start = () if slot is None else tags[slot]
                limit = token_limit(model, len(prompt) + len(start), sampling.max_new_tokens)
                own_seed = sample_seed(seed, example.id, slot, sample)
                asked = question_mark(example)
                requests.append(Request(example.id, prompt, start, slot, sample, own_seed, limit, question=asked))
        except UserError as error:
            wrong.add(example.file, example.line, error)
    wrong.raise_if_any()
    return requests


def token_limit(model: ModelFolder, before: int, max_new_tokens: int) -> int:
    """Count the tokens that may follow `before` tokens. Raises RowError if the model has no place for any."""
    if model.max_length is None:
        return max_new_tokens
    room = model.max_length - before
    if room < 1:
        raise RowError(f"the prompt is {before} tokens with its tag, the model takes {model.max_length}; shorten it")
    return min(max_new_tokens, room)


def describe_tags(tags: ForkingTokens) -> str:
    """Name the tags in a few words, to tell two sets of them apart: `special, 6: <think1>`."""
    return f"{tags.format}, {tags.num_tags}: {tags.strings[0]}"


class Origin(TypedDict):
    """What shapes the samples of a backend besides the sampling settings."""

    backend: Literal["hf", "openai", "vllm"]
    dtype: NotRequired[str]
    served_model: NotRequired[str]
    token_ids: NotRequired[Literal["server", "tokenized again"]]


class SamplingSettings(TypedDict):
    """What shapes a sample besides the model, the question and the backend."""

    mode: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int
    tags: NotRequired[str]
    """As `describe_tags` names them."""
    tag: NotRequired[int]


class SamplingRecord(SamplingSettings, Origin):
    """The field `sampling` of every line: all that shapes a sample but the model and the question.

    How many samples there are is left out, so that more can be added to a file.
    """


class RolloutMaker:
    """Turns what backends generate into lines of the rollout file."""

    def __init__(self, model: ModelFolder, plan: TagPlan, sampling: Mapping[str, object]) -> None:
        """`sampling`: the field of that name in every line, in general a SamplingRecord."""
        self._model, self._sampling = model, sampling
        self._own = OwnTags(model.tags, model.tokenizer) if plan.mode in ("own", "own-greedy") and model.tags else None
        self.unclear_tags = 0
        """Rollouts without a tag whose text names one: only its token would tell whether it is one."""

    def rollout(self, done: Generated) -> Rollout:
        """Make the line. `text` and `token_ids` follow the tag; the ids end with the stop token, if there is one.

        Where only the text is known, it is tokenized again, and the end of text is taken for the stop token.
        """
        request, ids = done.request, done.token_ids
        tag = request.slot if request.chosen is None else request.chosen
        own = self._own if request.chosen is None else None
        if ids is None:
            text = done.text
            if own is not None:
                self.unclear_tags += own.is_unclear(text)
                tag, text = own.split_text(text)
            ids = tuple(self._model.tokenizer.encode(text))
            ids += (self._model.tokenizer.eos_id,) * (done.finish_reason == "stop")
        else:
            if own is not None:
                tag, length = own.find(ids)
                ids = ids[length:]
            stopped = done.finish_reason == "stop"
            if stopped and not (ids and ids[-1] in self._model.stop_ids):
                ids = (*ids, self._model.tokenizer.eos_id)  # a server that keeps its stop token to itself
            text = self._model.tokenizer.decode(ids[:-1] if stopped else ids)
        return Rollout(
            id=request.id,
            tag=tag,
            sample=request.sample,
            finish_reason=done.finish_reason,
            seed=request.seed,
            sampling=self._sampling,
            model=self._model.fingerprint,
            tokenizer=self._model.tokenizer_fingerprint,
            text=text,
            token_ids=ids,
            prompt=prompt_mark(request),
            question=request.question,
        )
