"""The first lines of a run's log, in words: the job, and how sequences are laid out."""

from __future__ import annotations

import torch

from megatron_ssft.config import RunConfig
from megatron_ssft.parallel.determinism import determinism_line
from megatron_ssft.parallel.device_defaults import device_line
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.tokenizers.vocabulary import Vocabulary


def describe_job(engine: Engine, vocabulary: Vocabulary, iteration: int, train_iters: int) -> str:
    """Vocabulary, ranks, parameters and steps; `iteration` of the `train_iters` steps are done."""
    topology, parallel = engine.topology, engine.config.parallel
    steps = f"steps {iteration + 1} to {train_iters}" if iteration < train_iters else "no step left"
    return (
        f"{vocabulary.size} vocabulary entries, {vocabulary.tags.num_tags} of them tags | "
        f"{topology.world_size} ranks: tensor {parallel.tensor_model_parallel_size} "
        f"x pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} "
        f"x data {topology.dp_size} on {topology.device.type} | "
        f"{engine.num_parameters} parameters on the first rank | {steps}"
    )


def describe_sequences(engine: Engine) -> str:
    """The sequence layout, and the attention's kernel where sequences stand in token streams."""
    layout, attention = engine.config.training.sequence_layout, engine.attention
    kernel = "" if layout == "padded" else f" | attention of streams through {attention.name} ({attention.why})"
    return f"{layout} sequences{kernel}"


def device_lines(config: RunConfig, device: torch.device) -> list[str]:
    """What the device decides of a run, and whether the same run would give the same bits again."""
    lines = (device_line(config, device), determinism_line(config.parallel.deterministic_mode, device))
    return [line for line in lines if line is not None]
