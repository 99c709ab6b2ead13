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


def estimate_size(config: RunConfig, vocab_size: int, tag_rows: int) -> CheckpointSize:
    """The size where every parameter is trained, from the shape alone.

    Args:
        vocab_size: entries in use, without padding.
        tag_rows: rows of tags of one token; the optimizer holds them beside the embedding.
    """
    parameters = count_parameters(config, vocab_size)
    trained = parameters + tag_rows * config.model.hidden_size
    return CheckpointSize(parameters * weight_bytes(config), trained * optimizer_bytes(config))


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
    query, kv = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    gated = 2 if m.swiglu else 1
    norm = 2 if m.normalization == "LayerNorm" else 1
    layer = m.hidden_size * (2 * query + 2 * kv) + m.hidden_size * m.ffn_hidden_size * (gated + 1)
    layer += 2 * norm * m.hidden_size
    if m.qk_layernorm:
        layer += 2 * norm * m.kv_channels
    if m.add_bias_linear or m.add_qkv_bias:
        layer += query + 2 * kv
    if m.add_bias_linear:
        layer += 2 * m.hidden_size + gated * m.ffn_hidden_size
    tables = 2 if m.untie_embeddings_and_output_weights else 1
    return m.num_layers * layer + (tables * padded_vocab_size(vocab_size, config) + norm) * m.hidden_size


def space_line(
    checkpoint: CheckpointConfig, size: CheckpointSize, iteration: int, train_iters: int, free: int | None
) -> str:
    """What a run's checkpoints take, in words.

    Args:
        iteration, train_iters: steps done, steps of the whole run.
        free: bytes where the run is saved; None: not known.
    """
    whole = size.whole if checkpoint.save_optim else size.weights
    parts = f"weights {shown(size.weights)}" + (f", optimizer {shown(size.optimizer)}" if checkpoint.save_optim else "")
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
