"""What --dry-run prints for policy learning: the resolved configuration and what follows from it, without a model."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import to_yaml
from megatron_ssft.objectives.policy.inputs import PolicyInputs, read_inputs
from megatron_ssft.parallel.checkpoint.checkpoint_size import count_parameters
from megatron_ssft.tokenizers.vocabulary import Vocabulary, build_vocabulary
from megatron_ssft.training.describe import (
    checkpoint_lines,
    checkpoint_to_take,
    described_world_size,
    device_lines,
)
from megatron_ssft.training.lr_schedule import warmup_iterations
from megatron_ssft.training.origin import check_origin, origin_line

Further = Callable[[Vocabulary], list[str]]
"""Gives further lines."""


def describe(config: GFPOConfig, world_size: int | None = None, further: Further | None = None) -> str:
    """Everything resolved, as text. Reads and checks all input, writes nothing. Raises UserError.

    Args:
        world_size: ranks of the job; see `described_world_size`.
        further: called at the end.
    """
    world_size = described_world_size(config.run, world_size)
    checkpoint = config.run.checkpoint
    check_origin(checkpoint)
    taken = checkpoint_to_take(checkpoint)
    resumed_at = taken if checkpoint.continues_in_place else None
    vocabulary = build_vocabulary(config.run)
    inputs = read_inputs(config, vocabulary, config.train_iters)
    tags = zip(vocabulary.tags.strings, vocabulary.tags.ids)
    iters = config.train_iters
    lines = [
        to_yaml(config),
        "# what follows from it",
        origin_line(config.run, resumed_at, taken),
        f"questions: {len(inputs.questions)} with rewards, {len(inputs.held_out)} held out",
        f"stored completions in use: {len(inputs.completions)}",
        f"vocabulary: {vocabulary.size} entries; tags: " + ", ".join(f"{s!r} {list(i)}" for s, i in tags),
        f"parameters: {count_parameters(config.run, vocabulary.size):,}",
        f"ranks: {world_size}, data-parallel {world_size // config.run.parallel.model_parallel_size}",
        f"steps: {iters}, warm-up {warmup_iterations(config.run.training, iters)}",
        f"per step: {_step(config, inputs)}",
        *checkpoint_lines(config.run, vocabulary, resumed_at or 0, iters, config.policy.last_layers),
        *inputs.notes,
        *([] if further is None else further(vocabulary)),
        *device_lines(config.run),
    ]
    return "\n".join(lines)


def _step(config: GFPOConfig, inputs: PolicyInputs) -> str:
    """Tokens of an average step."""
    policy = config.policy
    questions = min(policy.questions_per_step, len(inputs.questions))
    prompts = questions * sum(len(q.prompt_ids) for q in inputs.questions) / len(inputs.questions)
    lengths = [len(c.ids) for c in inputs.completions]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    if policy.objective == "grpo":
        tokens = questions * mean * len(lengths) / len(inputs.questions)
        return f"{questions} questions, about {tokens:,.0f} completion tokens"
    text = f"{questions} questions, about {prompts:,.0f} prompt tokens (scored, then trained)"
    if policy.anchor == "kl":
        anchored = min(policy.anchor_completions or 0, len(lengths)) * mean
        text += f", about {anchored:,.0f} tokens of completions for the anchor"
    return text
