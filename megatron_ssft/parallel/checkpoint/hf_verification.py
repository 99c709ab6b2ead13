"""Proof that a Hugging Face folder and Megatron weights are the same model: every tensor, and the logits.

Two checks that fail for different reasons. *Tensors*: every slice a rank holds equals, bit for bit, what the folder
holds. *Logits*: transformers and the engine, both in float32, agree on sample text at the parallel layout in use; that
proves names, interleaving, norms, rotary angles. A model too large for the host is cut to its first layers for
the logits, and the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.hf.tensor_map import hf_tensors
from megatron_ssft.parallel.checkpoint.hf import load_hf_weights
from megatron_ssft.parallel.collectives import gather_json, on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import ForkingTokens

MAX_DIFFERENCE = 1e-3
"""Largest difference of two logits that still counts as rounding, in float32."""


@dataclasses.dataclass(frozen=True)
class LogitReport:
    """Result of a comparison of logits."""

    max_difference: float
    mean_difference: float
    top1_agreement: float
    """Share of positions at which both have the same most likely token."""
    tokens: int
    layers: int
    of_layers: int

    def __str__(self) -> str:
        cut = "" if self.layers == self.of_layers else f" (first {self.layers} of {self.of_layers} layers: host memory)"
        return (
            f"logits of {self.tokens} tokens, float32{cut}: max difference {self.max_difference:.2e}, mean "
            f"{self.mean_difference:.2e}, top-1 agreement {self.top1_agreement:.1%}"
        )


def verify_logits(
    config: RunConfig,
    topology: Topology,
    tags: ForkingTokens,
    vocab_size: int,
    folder: Path,
    load: Callable[[Engine], None],
    ids: list[int],
    new_rows: tuple[int, ...] = (),
) -> LogitReport:
    """Compare transformers on `folder` with an engine that `load` fills, both in float32. Collective.

    Args:
        vocab_size: rows the engine's tables have in use; the folder may have fewer (tags not added yet).
        load: fills a float32 engine with the Megatron weights; not used where the stack is cut.
        ids: token ids of the sample.
        new_rows: vocabulary rows of tags that the folder does not have yet; their logits are not compared.

    Raises:
        UserError: the largest difference is above MAX_DIFFERENCE.
    """
    layers = min(gather_json(_layers_that_fit(config), topology))
    # TransformerEngine may compute float32 products in TF32.
    model = dataclasses.replace(config.model, num_layers=layers, transformer_impl="local")
    parallel = dataclasses.replace(config.parallel, bf16=False, use_distributed_optimizer=False)
    engine = Engine(dataclasses.replace(config, model=model, parallel=parallel), topology, vocab_size, tags.row_ids)
    if layers == config.model.num_layers:
        load(engine)
    else:
        load_hf_weights(engine, folder, only_some_layers=True)
    logits = engine.logits(ids)

    def compare() -> list[float]:
        assert logits is not None, "the first rank has the logits"
        return _compare(folder, layers, ids, logits, new_rows)

    largest, mean, agreement = on_first_rank(compare, topology)
    report = LogitReport(largest, mean, agreement, len(ids), layers, config.model.num_layers)
    if not report.max_difference <= MAX_DIFFERENCE:
        raise UserError(f"{folder}: not the same model as the Megatron weights: {report}")
    return report


def _layers_that_fit(config: RunConfig) -> int:
    """Count layers whose float32 copy takes half of the free memory: whole on the host, this rank's shard on a GPU."""
    model, parallel = config.model, config.parallel
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in hf_tensors(model).items()}
    per_layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    free = psutil.virtual_memory().available
    if torch.cuda.is_available():
        shards = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        free = min(free, torch.cuda.mem_get_info()[0] * shards)
    budget = free // 2 - (sum(sizes.values()) - per_layer * model.num_layers)
    multiple = parallel.pipeline_model_parallel_size * (parallel.num_layers_per_virtual_pipeline_stage or 1)
    multiple *= 2 if parallel.num_layers_per_virtual_pipeline_stage else 1
    fitting = min(model.num_layers, budget // per_layer // multiple * multiple)
    return max(fitting, multiple)


def _compare(folder: Path, layers: int, ids: list[int], logits: torch.Tensor, new_rows: tuple[int, ...]) -> list[float]:
    """[largest difference, mean difference, share of positions with the same most likely token]"""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a moment, in the middle of the log
    hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    hf_config.num_hidden_layers = layers
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=hf_config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        reference = model(torch.tensor([ids])).logits[0].float()
    shared_rows = [i for i in range(min(reference.size(1), logits.size(1))) if i not in new_rows]
    reference, logits = reference[:, shared_rows], logits[:, shared_rows]
    difference = (reference - logits).abs()
    same = (reference.argmax(-1) == logits.argmax(-1)).float().mean()
    return [float(difference.max()), float(difference.mean()), float(same)]
