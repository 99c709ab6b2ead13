"""From flags to a file of rollouts: open, plan, resume, generate, write."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from megatron_ssft.data.prompt import control_token_notes, count_control_tokens
from megatron_ssft.data.questions import read_questions
from megatron_ssft.errors import UserError
from megatron_ssft.formats.failed_samples import FailedSample, read_failed, write_failed
from megatron_ssft.formats.rollout_writer import RolloutWriter, resume_rollouts
from megatron_ssft.formats.rollouts import OWN_MODES, Rollout, RolloutKey
from megatron_ssft.generation.backend import Backend
from megatron_ssft.generation.model_folder import ModelFolder, TagFlags, open_model_folder
from megatron_ssft.generation.own_tags import OwnTags
from megatron_ssft.generation.requests import (
    Failed,
    Generated,
    Request,
    RolloutMaker,
    Sampling,
    SamplingRecord,
    SamplingSettings,
    TagPlan,
    build_requests,
    describe_tags,
    plan_tags,
    prompt_mark,
    token_limit,
)
from megatron_ssft.progress import Wording, track
from megatron_ssft.records import SetExample
from megatron_ssft.tokenizers.data_text import DEFAULT_RULES, PromptRules

GREEDY_STEPS = 256
"""Mode own-greedy: most steps until a tag is complete, as in the published evaluation."""
_PROGRESS = Wording("generating", "{done} of {total} samples, {speed}", "{done} of {total} samples were there")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Says what to generate, from what, into which file. Names are those of the flags of megatron-ssft generate."""

    model: Path
    data: Path
    output: Path
    tags: str
    sampling: Sampling
    seed: int
    tag: str | None = None
    samples_per_tag: int | None = None
    samples: int | None = None
    limit: int | None = None
    tag_flags: TagFlags = field(default_factory=TagFlags)
    prompt_rules: PromptRules = DEFAULT_RULES
    backend: str = "hf"
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    share_prompt: bool = True
    tensor_parallel_size: int = 1
    base_url: tuple[str, ...] = ()
    served_model: str | None = None
    concurrency: int = 16
    timeout: float = 3600.0
    retries: int = 5

    def __post_init__(self) -> None:
        """Raises UserError."""
        for name in ("limit", "batch_size", "tensor_parallel_size", "concurrency", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be positive")
        if self.retries < 0:
            raise UserError(f"--retries {self.retries}: must not be negative")
        if bool(self.base_url) != (self.backend == "openai"):
            raise UserError("--backend openai and --base-url go together; give both or neither")
        if len(set(self.base_url)) < len(self.base_url):
            raise UserError("--base-url: names a server twice; give each once")


@dataclass
class Summary:
    """Counts of what one call added to the file."""

    samples: int = 0
    tokens: int = 0
    cut_off: int = 0
    """Samples that ended at the limit."""
    without_tag: int = 0
    """Samples for which the model was free to write a tag and wrote none."""
    unclear_tags: int = 0
    """Those of them whose text names a tag, of which a text cannot tell whether it is one."""
    failed: tuple[FailedSample, ...] = ()
    """Samples that could not be made."""
    seconds: float = 0.0
    """Without loading the model."""


def _notes(
    options: Options, model: ModelFolder, examples: Sequence[SetExample], requests: Sequence[Request]
) -> list[str]:
    """What is unusual about tokenizer and prompts."""
    spelled: Counter[str] = Counter()
    for example in examples:
        spelled += count_control_tokens(example, model.tokenizer)
    as_what = options.prompt_rules.control_tokens
    notes = [*model.tokenizer.remarks, *control_token_notes(spelled["questions"], 0, spelled["prompts"], as_what)]
    prompts = {request.id: request.prompt for request in requests}
    tag_ids = model.tags.ids if model.tags is not None else ()
    same = sum(any(_contains(prompt, ids) for ids in tag_ids) for prompt in prompts.values())
    if same:
        notes.append(
            f"data: {same} of {len(prompts)} prompts hold the very tokens of a tag; "
            + (
                "tags of format text are ordinary text, which a question may spell"
                if as_what != "control"
                else "they were written as control tokens, or as the ordinary text that tags of format text are"
            )
        )
    return notes


def _contains(ids: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether `part` stands somewhere in `ids`."""
    return any(ids[i : i + len(part)] == part for i, first in enumerate(ids) if first == part[0])


def generate_file(options: Options, console: Console) -> Summary:
    """Generate what the file does not hold yet. Raises UserError."""
    model = open_model_folder(options.model, options.tag_flags, options.prompt_rules)
    plan = plan_tags(
        options.tags, model.tags, tag=options.tag, samples_per_tag=options.samples_per_tag, samples=options.samples
    )
    examples = read_questions(options.data)
    requests = build_requests(examples[: options.limit], model, plan, options.sampling, options.seed)
    for note in _notes(options, model, examples[: options.limit], requests):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    backend = make_backend(options, model, console)
    settings = sampling_record(options, model, plan, backend)
    done = resume_rollouts(
        options.output,
        model=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        sampling=settings,
        prompts={request.id: prompt_mark(request) for request in requests},
    )
    strangers = {key[0] for key in done} - {example.id for example in examples}
    if strangers:
        raise UserError(
            f"{options.output}: holds rollouts of question {min(strangers)!r}, which is not in {options.data}; give "
            "another --output"
        )
    pending = [request for request in requests if request.key not in done]
    maker = RolloutMaker(model, plan, settings)
    noted = {row.key: row for row in read_failed(options.output, done)}
    if not pending:
        console.print(f"all {len(requests)} samples were there", highlight=False)
        write_failed(options.output, [*noted.values()])
        return Summary()
    backend.load()
    generated = _generated(backend, model, plan, options.sampling, pending)
    results = (done if isinstance(done, Failed) else maker.rollout(done) for done in generated)
    shown = _shown(console, results, len(requests) - len(pending), len(requests))
    summary = _write(options.output, shown, noted)
    summary.failed = tuple(noted[request.key] for request in pending if request.key in noted)
    summary.unclear_tags = maker.unclear_tags
    return summary


def _write(path: Path, results: Iterable[Rollout | Failed], noted: dict[RolloutKey, FailedSample]) -> Summary:
    """Write the samples as they come, and beside them which failed. Raises UserError.

    `noted`: samples that failed earlier, brought up to date. They stay noted until they are there, also those that this
    call does not ask for.
    """
    summary, started = Summary(), time.monotonic()
    try:
        with RolloutWriter(path) as writer:
            for done in results:
                if isinstance(done, Failed):
                    request = done.request
                    noted[request.key] = FailedSample(
                        id=request.id, slot=request.slot, sample=request.sample, reason=done.reason
                    )
                    continue
                writer.write([done])
                noted.pop(done.key, None)
                summary.samples += 1
                summary.tokens += len(done.token_ids)
                summary.cut_off += done.finish_reason == "length"
                summary.without_tag += done.tag is None and done.mode in OWN_MODES
    finally:
        write_failed(path, [*noted.values()])
    summary.seconds = time.monotonic() - started
    return summary


def make_backend(options: Options, model: ModelFolder, console: Console) -> Backend:
    """Make the backend that `options` name; the weights are not loaded. Raises UserError."""
    if options.backend == "hf":
        from megatron_ssft.generation.hf_backend import HFBackend  # here: imports torch

        return HFBackend(
            model.path,
            options.sampling,
            model.stop_ids,
            device=options.device,
            dtype=options.dtype,
            batch_size=options.batch_size,
            share_prompt=options.share_prompt,
        )
    if options.backend == "vllm":
        from megatron_ssft.generation.vllm_backend import VLLMBackend

        return VLLMBackend(
            model.path,
            options.sampling,
            model.stop_ids,
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            batch_size=options.batch_size,
        )
    from megatron_ssft.generation.http_client import HttpClient
    from megatron_ssft.generation.openai_backend import OpenAIBackend
    from megatron_ssft.generation.openai_servers import OpenAIServers

    def log(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    servers = [
        OpenAIBackend(
            model,
            options.sampling,
            HttpClient(url, options.timeout, options.retries),
            served_model=options.served_model,
            concurrency=options.concurrency,
            log=log,
            seeks_tags=options.tags in OWN_MODES,
        )
        for url in options.base_url
    ]
    return servers[0] if len(servers) == 1 else OpenAIServers(servers, log)


def sampling_record(options: Options, model: ModelFolder, plan: TagPlan, backend: Backend) -> SamplingRecord:
    """Collect all that shapes a sample but the model and the question."""
    sampling, tags = options.sampling, model.tags
    settings: SamplingSettings = {
        "mode": plan.mode,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": options.seed,
    }
    if plan.mode != "none" and tags is not None:
        settings["tags"] = describe_tags(tags)
    if plan.tag is not None:
        settings["tag"] = plan.tag
    return {**settings, **backend.origin}


def _generated(
    backend: Backend, model: ModelFolder, plan: TagPlan, sampling: Sampling, requests: list[Request]
) -> Iterator[Generated | Failed]:
    """Yield the samples; in mode own-greedy after the model has chosen a tag for each question."""
    if plan.mode != "own-greedy":
        yield from backend.generate(requests)
        return
    assert model.tags is not None  # as plan_tags checks
    own = OwnTags(model.tags, model.tokenizer)
    by_question: dict[str, list[Request]] = {}
    for request in requests:
        by_question.setdefault(request.id, []).append(request)
    names = list(by_question)
    for first in range(0, len(names), backend.chunk_size):
        groups = [by_question[name] for name in names[first : first + backend.chunk_size]]
        heads = [
            dataclasses.replace(group[0], limit=token_limit(model, len(group[0].prompt), GREEDY_STEPS))
            for group in groups
        ]
        starts = backend.greedy(heads, lambda ids: own.ends_with_tag(ids) is not None)
        chosen = []
        for request in (request for group in groups for request in group):
            start = starts.get(request.id)
            if isinstance(start, Failed):  # sampled without it, it would be of another mode
                yield Failed(request, start.reason)
            else:
                chosen.append(_started(request, start, own, model, sampling))
        yield from backend.generate(chosen)


def _started(
    request: Request, start: tuple[int, ...] | None, own: OwnTags, model: ModelFolder, sampling: Sampling
) -> Request:
    """Continue `request` after what was chosen for its question; without that it stays as in mode own."""
    if start is None:
        return request
    limit = token_limit(model, len(request.prompt) + len(start), sampling.max_new_tokens)
    return dataclasses.replace(request, start=start, chosen=own.ends_with_tag(start), limit=limit)


def _shown(console: Console, results: Iterable[Rollout | Failed], done: int, total: int) -> Iterator[Rollout | Failed]:
    """Pass `results` on: with a bar on a terminal, with a plain line now and then elsewhere."""
    return track(results, console, _PROGRESS, done, total, _Speed())


class _Speed:
    """Tokens per second so far, told after every sample."""

    def __init__(self) -> None:
        self._started, self._tokens = time.monotonic(), 0

    def __call__(self, done: Rollout | Failed) -> str:
        self._tokens += 0 if isinstance(done, Failed) else len(done.token_ids)
        return f"{self._tokens / max(time.monotonic() - self._started, 1e-9):.0f} tokens/s"
