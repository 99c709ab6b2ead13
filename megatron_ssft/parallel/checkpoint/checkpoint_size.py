"""How large a checkpoint is: its tensors, counted from a configuration or from a model that is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ssft.config import CheckpointConfig, RunConfig
from megatron_ssft.parallel.collectives import sum_over_ranks
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.gpt import padded_vocab_size

_UNITS = ("kB", "MB", "GB", "TB", "PB")
_FLOAT32 = 4


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint's tensors; the files hold a little more."""

    weights: int
    optimizer: int

    @property
    def whole(self) -> int:
        """Weights and optimizer."""
        return self.weights + self.optimizer


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a stored weight."""
    return 2 if config.parallel.bf16 else _FLOAT32


def optimizer_bytes(config: RunConfig) -> int:
    """Bytes of AdamW's state of one trained parameter: two averages, and a float32 weight where the model's is none.

    The distributed optimizer stores that in float32 training as well.
    """
    has_masters = config.parallel.bf16 or config.parallel.use_distributed_optimizer
    return (3 if has_masters else 2) * _FLOAT32


def estimate_size(config: RunConfig, vocab_size: int, tag_rows: int, last_layers: int | None = None) -> CheckpointSize:
    """The size from the shape alone.

    Args:
        vocab_size: entries in use, without padding.
        tag_rows: rows of tags of one token; the optimizer holds them beside the embedding.
        last_layers: only so many layers and the tags' rows of the head are trained; None: every parameter is.
    """
    parameters = count_parameters(config, vocab_size)
    trained = _count_trained(config, vocab_size, tag_rows, last_layers)
    return CheckpointSize(parameters * weight_bytes(config), trained * optimizer_bytes(config))


def _count_trained(config: RunConfig, vocab_size: int, tag_rows: int, last_layers: int | None) -> int:
    """Parameters that the optimizer holds."""
    m = config.model
    rows = tag_rows * m.hidden_size
    if last_layers is None:
        return count_parameters(config, vocab_size) + rows
    if m.untie_embeddings_and_output_weights and tag_rows:
        rows = padded_vocab_size(vocab_size, config) * m.hidden_size  # the head is one tensor
    norm = _norm_parameters(config) if last_layers else 0
    return min(last_layers, m.num_layers) * _layer_parameters(config) + norm + rows


def measure_size(engine: Engine) -> CheckpointSize:
    """The size of the checkpoints of a started engine, whose frozen parameters have no optimizer state. Collective."""
    topology = engine.topology
    is_first_stage = engine.chunks[0].pre_process
    weights = trained = 0
    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            is_copy = getattr(parameter, "shared_embedding", False) and not is_first_stage
            is_whole = not getattr(parameter, "tensor_model_parallel", False)
            if is_copy or (is_whole and topology.tp_rank) or topology.dp_rank or topology.cp_rank:
                continue
            trained += parameter.numel() if parameter.requires_grad else 0
            if not name.endswith("forking_rows.weight"):  # folded into the embedding
                weights += parameter.numel()
    weights, trained = (int(count) for count in sum_over_ranks(np.array([weights, trained], np.float64), topology))
    return CheckpointSize(weights * weight_bytes(engine.config), trained * optimizer_bytes(engine.config))


def count_parameters(config: RunConfig, vocab_size: int) -> int:
    """Parameters of the model, the vocabulary's padding and the norms with them."""
    m = config.model
    tables = 2 if m.untie_embeddings_and_output_weights else 1
    table = padded_vocab_size(vocab_size, config) * m.hidden_size
    return m.num_layers * _layer_parameters(config) + tables * table + _norm_parameters(config)


def _norm_parameters(config: RunConfig) -> int:
    return (2 if config.model.normalization == "LayerNorm" else 1) * config.model.hidden_size


def _layer_parameters(config: RunConfig) -> int:
    m = config.model
    query, kv = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    gated = 2 if m.swiglu else 1
    norm = 2 if m.normalization == "LayerNorm" else 1
    layer = m.hidden_size * (2 * query + 2 * kv) + m.hidden_size * m.ffn_hidden_size * (gated + 1)
    layer += 2 * _norm_parameters(config)
    if m.qk_layernorm:
        layer += 2 * norm * m.kv_channels
    if m.add_bias_linear or m.add_qkv_bias:
        layer += query + 2 * kv
    if m.add_bias_linear:
        layer += 2 * m.hidden_size + gated * m.ffn_hidden_size
    return layer


def space_line(
    checkpoint: CheckpointConfig, size: CheckpointSize, iteration: int, train_iters: int, free: int | None
) -> str:
    """What a run's checkpoints take, in words.

    Args:
        iteration, train_iters: steps done, steps of the whole run.
        free: bytes where the run is saved; None: not known.
    """
    contents = {"weights": size.weights}
    if checkpoint.save_optim:
        contents["optimizer"] = size.optimizer
    if checkpoint.export_hf_at_save:
        contents["export"] = size.weights
    whole = sum(contents.values())
    parts = ", ".join(f"{name} {shown(count)}" for name, count in contents.items())
    every = checkpoint.save_interval or max(train_iters, 1)
    written = max(-(-train_iters // every) - iteration // every, 0)
    count = written
    told = f"{written} to be written, all stay"
    if checkpoint.keep_last is not None:
        marked = 0 if checkpoint.keep_every is None else train_iters // checkpoint.keep_every
        count = min(written, checkpoint.keep_last + marked) + (1 if written > checkpoint.keep_last else 0)
        told = f"{written} to be written, the last {checkpoint.keep_last} stay"
        told += f" and those of every {checkpoint.keep_every} steps" if checkpoint.keep_every else ""
        told += f", {count} at once while the newest is written" if count > checkpoint.keep_last else ""
    line = f"checkpoints: {shown(whole)} each ({parts}); {told}: {shown(count * whole)}"
    if free is None:
        return line
    return f"{line}, {shown(free)} are free" + (": NOT ENOUGH" if count * whole > free else "")


def shown(count: int) -> str:
    """A number of bytes for a person."""
    value, unit = float(count), "B"
    for larger in _UNITS:
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
