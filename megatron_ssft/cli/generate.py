"""Generate samples under the tags of a trained model.

    megatron-ssft generate --model HF_DIR --data Q.jsonl --output R.jsonl --tags each --samples-per-tag 4
    megatron-ssft generate --model HF_DIR --data Q.jsonl --output R.jsonl --tags fixed --tag "<think2>" --samples 32
    megatron-ssft generate --model HF_DIR --data Q.jsonl --output R.jsonl --tags own-greedy --samples 32 \\
        --backend openai --base-url http://localhost:8000/v1

Started again after a kill it goes on where it stopped. Samples that a server never gives are noted in R.failed.jsonl,
and the rest is finished; started again, only those are tried. Exit status: 0 when all samples are there, 3 when some
failed, 2 for wrong input and for a server that gives nothing. Tag modes:

  each         every tag --samples-per-tag times
  fixed        one tag, --tag
  round-robin  sample i of a question under tag i mod N
  own          the model begins by itself; which tag it wrote is noted
  own-greedy   greedy steps until the model has written a tag, once for each question, then samples from there
  none         a model without tags

Tags are 0-based in numbers: 0 is <think1>. Lines of R.jsonl: megatron_ssft/formats/rollouts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import is_date, require
from megatron_ssft.config.fields import Flag

if TYPE_CHECKING:
    from megatron_ssft.generation.run import Options

TAGS, SAMPLING, BACKEND = "tags", "sampling", "backend"
"""Headings in --help."""


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """Model, questions, tags, and how samples are drawn and by what."""

    model: Annotated[Path, Flag(metavar="HF_DIR")]
    """Exported model."""
    data: Annotated[Path, Flag(metavar="Q.jsonl")]
    """Questions, as for training."""
    output: Annotated[Path, Flag(metavar="R.jsonl")]
    """Rollouts, appended."""
    limit: Annotated[int | None, Flag(metavar="Q")] = None
    """The first Q questions only."""
    template_date: Annotated[str | None, Flag(metavar="YYYY-MM-DD")] = None
    """Today, to a chat template that writes the date; as in training."""
    prompt_control_tokens: Literal["refuse", "control", "text"] = "refuse"
    """What a control token in a verbatim prompt is; as in training."""

    tags: Annotated[Literal["each", "fixed", "round-robin", "own", "own-greedy", "none"], Flag(group=TAGS)] = "each"
    """Tag mode; see above."""
    tag: Annotated[str | None, Flag(metavar="K", group=TAGS)] = None
    """Tag of --tags fixed: number from 0, or text."""
    samples_per_tag: Annotated[int | None, Flag(metavar="K", group=TAGS)] = None
    """Samples per question and tag, with --tags each or fixed; default 1."""
    samples: Annotated[int | None, Flag(metavar="K", group=TAGS)] = None
    """Samples per question, in the other modes; default 1."""
    num_forking_tokens: Annotated[int | None, Flag(metavar="N", group=TAGS)] = None
    """Number of tags, for a folder without forking_tokens.json."""
    forking_token_format: Annotated[Literal["special", "text"] | None, Flag(group=TAGS)] = None
    """With --num-forking-tokens; default special."""
    forking_token_template: Annotated[str | None, Flag(metavar="TEXT", group=TAGS)] = None
    """With --num-forking-tokens; {i} stands for the number."""

    temperature: Annotated[float, Flag(group=SAMPLING)] = 0.7
    """Divides the logits; 0: the likeliest token."""
    greedy: Annotated[bool, Flag(group=SAMPLING)] = False
    """The same as --temperature 0."""
    top_p: Annotated[float, Flag(group=SAMPLING)] = 0.95
    """Draw from the likeliest tokens that have this probability together."""
    top_k: Annotated[int, Flag(group=SAMPLING)] = 0
    """Draw from this many of the likeliest tokens; 0: no limit."""
    max_new_tokens: Annotated[int, Flag(group=SAMPLING)] = 4096
    """Limit of a sample."""
    seed: Annotated[int, Flag(group=SAMPLING)] = 1234
    """Decides every draw."""

    backend: Annotated[Literal["hf", "openai", "vllm"], Flag(group=BACKEND)] = "hf"
    """hf (transformers, here), vllm (here) or openai (a server)."""
    batch_size: Annotated[int | None, Flag(group=BACKEND)] = None
    """hf: sequences decoded together, default by memory; vllm: requests handed over together."""
    device: Annotated[str | None, Flag(group=BACKEND)] = None
    """hf: cpu or cuda; default: cuda if there is one."""
    dtype: Annotated[str | None, Flag(group=BACKEND)] = None
    """hf, vllm: float32, bfloat16 or float16; default: float32 on the cpu, else as stored."""
    share_prompt: Annotated[bool, Flag(group=BACKEND)] = True
    """hf: compute a prompt once for all of its samples."""
    tensor_parallel_size: Annotated[int, Flag(group=BACKEND)] = 1
    """vllm: GPUs."""
    base_url: Annotated[tuple[str, ...], Flag(metavar="URL", group=BACKEND)] = ()
    """openai: the server, such as http://localhost:8000/v1, or several of the same model, which share the work."""
    served_model: Annotated[str | None, Flag(metavar="NAME", group=BACKEND)] = None
    """openai: the model's name, if the server has several."""
    concurrency: Annotated[int, Flag(group=BACKEND)] = 16
    """openai: requests under way, at each server."""
    timeout: Annotated[float, Flag(group=BACKEND)] = 3600.0
    """openai: seconds that one attempt of a request may take in all, from the connection to the last byte."""
    retries: Annotated[int, Flag(group=BACKEND)] = 5
    """openai: further attempts of a request, at most 30 s after the one before."""

    def options(self) -> Options:
        """Options of the library. Raises UserError."""
        from megatron_ssft.generation.model_folder import TagFlags
        from megatron_ssft.generation.requests import Sampling
        from megatron_ssft.generation.run import Options
        from megatron_ssft.tokenizers.data_text import PromptRules

        require(
            self.template_date is None or is_date(self.template_date),
            f"--template-date {self.template_date}: give a day as YYYY-MM-DD",
        )
        return Options(
            model=self.model,
            data=self.data,
            output=self.output,
            limit=self.limit,
            tags=self.tags,
            tag=self.tag,
            samples_per_tag=self.samples_per_tag,
            samples=self.samples,
            prompt_rules=PromptRules(self.template_date, self.prompt_control_tokens),
            tag_flags=TagFlags(self.num_forking_tokens, self.forking_token_format, self.forking_token_template),
            sampling=Sampling(
                temperature=0.0 if self.greedy else self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_new_tokens=self.max_new_tokens,
            ),
            seed=self.seed,
            backend=self.backend,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            share_prompt=self.share_prompt,
            tensor_parallel_size=self.tensor_parallel_size,
            base_url=self.base_url,
            served_model=self.served_model,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
        )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse, generate, print; returns the exit status. Raises UserError."""
    flags = parse_options(GenerateFlags, __doc__, argv, prog)
    from rich.console import Console

    from megatron_ssft.formats.failed_samples import FAILED_SAMPLES, failed_path, kinds
    from megatron_ssft.generation.run import generate_file

    options = flags.options()
    console = Console()
    summary = generate_file(options, console)
    speed = f" in {summary.seconds:.1f} s: {summary.tokens / summary.seconds:.0f} tokens/s" if summary.samples else ""
    untagged = f"{summary.without_tag} without a tag; " if options.tags in ("own", "own-greedy") else ""
    if summary.unclear_tags:
        untagged = (
            f"{summary.without_tag} without a tag, {summary.unclear_tags} of them with one's letters behind their "
            "beginning; "
        )
    text = (
        f"{summary.samples} samples, {summary.tokens} tokens{speed}; {summary.cut_off} cut off at their limit; "
        f"{untagged}{options.output}"
    )
    if summary.failed:
        text += (
            f"\n{len(summary.failed)} samples failed: {kinds(summary.failed)}; they are noted in "
            f"{failed_path(options.output)}; start again to try them alone"
        )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return FAILED_SAMPLES if summary.failed else 0
