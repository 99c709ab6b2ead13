"""Which rows of which Hugging Face tensor make up each Megatron tensor.

One table, `_TENSORS`, says it for all families; which of its lines a model has follows from its ModelConfig. Columns
are the same on both sides, so everything is about rows. A Megatron tensor is a number of equal blocks, and each block
holds one share of every Hugging Face tensor in turn: for QKV a block is a query group (its query heads, then its key,
then its value); gate and up are one block, all gate rows before all up rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_ssft.config import ModelConfig


class Segment(NamedTuple):
    """Rows [start, stop) of a Megatron tensor are the rows of the Hugging Face tensor `name` from `hf_start` on."""

    name: str
    start: int
    stop: int
    hf_start: int


class Source(NamedTuple):
    """Rows `rows` of the Hugging Face tensor `name` stand from `local_start` on in the slice that was asked for."""

    name: str
    rows: slice
    local_start: int


class MegatronTensor(NamedTuple):
    """A tensor as the sharded checkpoint names it, whole; vocabulary tables without padding rows."""

    key: str
    layer: int | None
    """0-based, or None for what stands outside the layers."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Rule:
    key: str
    """Key of the sharded checkpoint, layers left out."""
    parts: tuple[tuple[str, str], ...]
    """(Hugging Face name, its number of rows), in the order within a block; `{i}` is the layer."""
    columns: str | None = None
    """Number of columns; None for vectors."""
    blocks: str | None = None
    """Number of blocks; None for one."""
    needs: str | None = None
    """The switch of ModelConfig that this tensor exists with; None for always."""

    @property
    def in_layers(self) -> bool:
        return "{i}" in self.parts[0][0]


_SELF, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
_HF = "model.layers.{i}."

_TENSORS: tuple[_Rule, ...] = (
    _Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocab"),), "hidden"),
    _Rule(_SELF + "linear_qkv.layer_norm_weight", ((_HF + "input_layernorm.weight", "hidden"),)),
    _Rule(
        _SELF + "linear_qkv.weight",
        (
            (_HF + "self_attn.q_proj.weight", "query"),
            (_HF + "self_attn.k_proj.weight", "key"),
            (_HF + "self_attn.v_proj.weight", "key"),
        ),
        "hidden",
        blocks="groups",
    ),
    _Rule(
        _SELF + "linear_qkv.bias",
        (
            (_HF + "self_attn.q_proj.bias", "query"),
            (_HF + "self_attn.k_proj.bias", "key"),
            (_HF + "self_attn.v_proj.bias", "key"),
        ),
        blocks="groups",
        needs="add_qkv_bias",
    ),
    _Rule(_SELF + "q_layernorm.weight", ((_HF + "self_attn.q_norm.weight", "head"),), needs="qk_layernorm"),
    _Rule(_SELF + "k_layernorm.weight", ((_HF + "self_attn.k_norm.weight", "head"),), needs="qk_layernorm"),
    _Rule(_SELF + "linear_proj.weight", ((_HF + "self_attn.o_proj.weight", "hidden"),), "query"),
    _Rule(_MLP + "linear_fc1.layer_norm_weight", ((_HF + "post_attention_layernorm.weight", "hidden"),)),
    _Rule(
        _MLP + "linear_fc1.weight",
        ((_HF + "mlp.gate_proj.weight", "ffn"), (_HF + "mlp.up_proj.weight", "ffn")),
        "hidden",
    ),
    _Rule(_MLP + "linear_fc2.weight", ((_HF + "mlp.down_proj.weight", "hidden"),), "ffn"),
    _Rule("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),)),
    _Rule(
        "output_layer.weight",
        (("lm_head.weight", "vocab"),),
        "hidden",
        needs="untie_embeddings_and_output_weights",
    ),
)
_BY_KEY = {rule.key: rule for rule in _TENSORS}


def megatron_tensors(model: ModelConfig) -> list[MegatronTensor]:
    """All tensors of the model: embedding, layer by layer, final norm, output head (untied only)."""
    return [MegatronTensor(rule.key, layer, _shape(rule, model)) for rule, layer in _walk(model)]


def hf_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face folder of this model has.

    In the order of `megatron_tensors`: the tensors that one Megatron tensor is made of follow each other, so an export
    needs one of those at a time.
    """
    sizes = _sizes(model)
    return {
        name.format(i=layer): (sizes[rows], *_columns(rule, sizes))
        for rule, layer in _walk(model)
        for name, rows in rule.parts
    }


def segments(key: str, layer: int | None, model: ModelConfig) -> tuple[Segment, ...]:
    """Parts that a Megatron tensor is made of, in the order of its rows and without gaps.

    Padding rows of the vocabulary come after the last segment.
    """
    rule, sizes = _BY_KEY[key], _sizes(model)
    assert rule.in_layers == (layer is not None), f"{key} with layer {layer}"
    assert _has(rule, model), f"{key} is no part of this model"
    blocks = sizes[rule.blocks] if rule.blocks else 1
    parts, start = [], 0
    for block in range(blocks):
        for name, rows in rule.parts:
            share = sizes[rows] // blocks
            parts.append(Segment(name.format(i=layer), start, start + share, block * share))
            start += share
    return tuple(parts)


def sources(key: str, layer: int | None, model: ModelConfig, row_range: range | slice) -> list[Source]:
    """Reads that give rows [start, stop) of a Megatron tensor, in order.

    Rows beyond `vocab_size` (padding) have no source.
    """
    first, last = row_range.start, row_range.stop
    reads = []
    for part in segments(key, layer, model):
        start, stop = max(part.start, first), min(part.stop, last)
        if start < stop:
            shift = part.hf_start - part.start
            reads.append(Source(part.name, slice(start + shift, stop + shift), start - first))
    return reads


def _walk(model: ModelConfig) -> list[tuple[_Rule, int | None]]:
    """(rule, layer) of every Megatron tensor of the model, in order."""
    assert model.swiglu and model.normalization == "RMSNorm" and not model.add_bias_linear, "of no known family"
    rules = [rule for rule in _TENSORS if _has(rule, model)]
    inside = [rule for rule in rules if rule.in_layers]
    first, last = rules.index(inside[0]), rules.index(inside[-1]) + 1
    return [
        *((rule, None) for rule in rules[:first]),
        *((rule, layer) for layer in range(_size(model.num_layers)) for rule in inside),
        *((rule, None) for rule in rules[last:]),
    ]


def _has(rule: _Rule, model: ModelConfig) -> bool:
    return rule.needs is None or getattr(model, rule.needs)


def _sizes(model: ModelConfig) -> dict[str, int]:
    """Words of `_TENSORS` -> rows, columns or blocks."""
    assert model.vocab_size is not None, "the vocabulary's size must be known"
    head, groups = _size(model.kv_channels), _size(model.num_query_groups)
    return {
        "vocab": model.vocab_size,
        "hidden": _size(model.hidden_size),
        "ffn": _size(model.ffn_hidden_size),
        "head": head,
        "query": _size(model.num_attention_heads) * head,
        "key": groups * head,
        "groups": groups,
    }


def _size(value: int | None) -> int:
    assert value is not None, "ModelConfig fills in or demands every size"
    return value


def _columns(rule: _Rule, sizes: dict[str, int]) -> tuple[int, ...]:
    return (sizes[rule.columns],) if rule.columns else ()


def _shape(rule: _Rule, model: ModelConfig) -> tuple[int, ...]:
    sizes = _sizes(model)
    return (sum(sizes[rows] for _, rows in rule.parts), *_columns(rule, sizes))
