"""Generate samples under the tags of a trained model.

    python tools/generate.py --model HF_DIR --data Q.jsonl --output R.jsonl --tags each --samples-per-tag 4
    python tools/generate.py --model HF_DIR --data Q.jsonl --output R.jsonl --tags fixed --tag "<think2>" --samples 32
    python tools/generate.py --model HF_DIR --data Q.jsonl --output R.jsonl --tags own-greedy --samples 32 \\
        --backend openai --base-url http://localhost:8000/v1

Started again after a kill it goes on where it stopped. Tag modes:

  each         every tag --samples-per-tag times
  fixed        one tag, --tag
  round-robin  sample i of a question under tag i mod N
  own          the model begins by itself; which tag it wrote is noted
  own-greedy   greedy steps until the model has written a tag, once for each question, then samples from there
  none         a model without tags

Tags are 0-based in numbers: 0 is <think1>. Lines of R.jsonl: megatron_ssft/formats/rollouts.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ssft.cli.entry import run_command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="exported model")
    parser.add_argument("--data", type=Path, required=True, metavar="Q.jsonl", help="questions, as for training")
    parser.add_argument("--output", type=Path, required=True, metavar="R.jsonl", help="rollouts, appended")
    parser.add_argument("--limit", type=int, metavar="Q", help="the first Q questions only")

    tags = parser.add_argument_group("tags")
    modes = ("each", "fixed", "round-robin", "own", "own-greedy", "none")
    tags.add_argument("--tags", choices=modes, default="each", help="[%(default)s]")
    tags.add_argument("--tag", metavar="K", help="tag of --tags fixed: number from 0, or text")
    tags.add_argument("--samples-per-tag", type=int, metavar="K", help="--tags each or fixed [1]")
    tags.add_argument("--samples", type=int, metavar="K", help="samples of a question, in the other modes [1]")
    tags.add_argument("--num-forking-tokens", type=int, metavar="N", help="for a folder without forking_tokens.json")
    tags.add_argument("--forking-token-format", choices=("special", "text"), help="with --num-forking-tokens [special]")
    tags.add_argument("--forking-token-template", metavar="TEXT", help="with --num-forking-tokens; {i} is the number")

    drawing = parser.add_argument_group("sampling")
    drawing.add_argument("--temperature", type=float, default=0.7, help="[%(default)s]")
    drawing.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    drawing.add_argument("--top-p", type=float, default=0.95, help="[%(default)s]")
    drawing.add_argument("--top-k", type=int, default=0, help="0: no limit [%(default)s]")
    drawing.add_argument("--max-new-tokens", type=int, default=4096, help="[%(default)s]")
    drawing.add_argument("--seed", type=int, default=1234, help="[%(default)s]")

    backend = parser.add_argument_group("backend")
    backend.add_argument("--backend", choices=("hf", "openai", "vllm"), default="hf", help="[%(default)s]")
    backend.add_argument("--batch-size", type=int, help="hf: sequences decoded together [by memory]; vllm: a chunk")
    backend.add_argument("--device", help="hf: cpu or cuda [cuda if there is one]")
    backend.add_argument("--dtype", help="hf, vllm: float32, bfloat16, float16 [cpu: float32, else as stored]")
    backend.add_argument("--no-share-prompt", action="store_true", help="hf: compute the prompt for every sample")
    backend.add_argument("--tensor-parallel-size", type=int, default=1, help="vllm: GPUs [%(default)s]")
    backend.add_argument("--base-url", metavar="URL", help="openai: the server, e.g. http://localhost:8000/v1")
    backend.add_argument("--served-model", metavar="NAME", help="openai: if the server has several")
    backend.add_argument("--concurrency", type=int, default=16, help="openai: requests under way [%(default)s]")
    backend.add_argument("--timeout", type=float, default=3600, help="openai: seconds a request [%(default)s]")
    backend.add_argument("--retries", type=int, default=5, help="openai: of a request [%(default)s]")
    return parser.parse_args(argv)


def main() -> None:
    """Parse, generate, print."""
    arguments = vars(parse())
    from rich.console import Console

    from megatron_ssft.generation.model_folder import TagFlags
    from megatron_ssft.generation.requests import Sampling
    from megatron_ssft.generation.run import Options, generate_file

    take = arguments.pop
    temperature = take("temperature")
    sampling = Sampling(
        temperature=0.0 if take("greedy") else temperature,
        top_p=take("top_p"),
        top_k=take("top_k"),
        max_new_tokens=take("max_new_tokens"),
    )
    tag_flags = TagFlags(take("num_forking_tokens"), take("forking_token_format"), take("forking_token_template"))
    options = Options(sampling=sampling, tag_flags=tag_flags, share_prompt=not take("no_share_prompt"), **arguments)
    console = Console()
    summary = generate_file(options, console)
    speed = f" in {summary.seconds:.1f} s: {summary.tokens / summary.seconds:.0f} tokens/s" if summary.samples else ""
    untagged = f"{summary.without_tag} without a tag; " if options.tags in ("own", "own-greedy") else ""
    console.print(
        f"{summary.samples} samples, {summary.tokens} tokens{speed}; {summary.cut_off} cut off at their limit; "
        f"{untagged}{options.output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
