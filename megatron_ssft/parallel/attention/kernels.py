"""Core attention over causal rows (padded layout) or a stream's segments (packed layout), by several kernels.

Which kernel is used is decided in choice.py.

Shapes: T tokens of a stream, s sequence, b batch, n query heads and g key/value groups on this tensor-parallel rank,
d channels of one head.

A segment's queries see all of its context and, causally, the segment itself. Its keys are gathered in that order, so
that to any kernel it is one sequence with more keys than queries and a causal mask aligned at the bottom right.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ssft.parallel.attention.segment_groups import SegmentGroup, group_segments
from megatron_ssft.parallel.device import to_device
from megatron_ssft.records import Segment

Attend = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]
"""(query [T, n, d], key [T, g, d], value [T, g, d], softmax scale) -> [T, n * d]"""
VarlenKernel = Callable[[Tensor, Tensor, Tensor, "VarlenAttend", "float | None"], Tensor]
"""(query, key and value in the order of the lengths, the lengths, softmax scale) -> the queries' outputs."""


@dataclass
class StreamParams(PackedSeqParams):
    """Carries the attention of one stream through Megatron's layers, which pass it on to the core attention."""

    attend: Attend = field(kw_only=True)


class CoreAttention(nn.Module):
    """Causal scaled-dot-product attention over rows, or over a stream's segments where `packed_seq_params` has them.

    Rows are padded on the right, so the causal mask alone keeps real tokens from seeing padding.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: StreamParams | None = None,
        **_: object,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]. `attention_mask` must be None."""
        assert attention_mask is None, "the mask is built in"
        if packed_seq_params is not None:
            q, k, v = (t.squeeze(1) for t in (query, key, value))
            return packed_seq_params.attend(q, k, v, self.softmax_scale).unsqueeze(1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=k.size(1) != q.size(1)
        )
        return context.permute(2, 0, 1, 3).flatten(2)


# -- torch SDPA: anywhere, and the reference ---------------------------------------------------------------------------


class SdpaAttend:
    """Segments of similar shape go through one call of torch's kernel; what the mask leaves out is padding."""

    def __init__(
        self, segments: tuple[Segment, ...], length: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.groups = [_SdpaGroup(g, dtype, device) for g in group_segments(segments, width)]
        self.outputs_in_order = to_device(_places_of_outputs(self.groups, length), device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        n, g, d = query.size(1), key.size(1), query.size(2)
        if not query.is_cpu and n != g:  # with a mask and grouped heads no fused CUDA kernel is found
            key, value = (t.repeat_interleave(n // g, dim=1) for t in (key, value))
            g = n
        query, key, value = (t.flatten(1) for t in (query, key, value))
        outputs = []
        for group in self.groups:
            # A lookup by embedding is a gather whose gradient is fast, and deterministic on CUDA as well.
            q = F.embedding(group.queries, query).unflatten(-1, (n, d)).transpose(1, 2)
            k, v = (F.embedding(group.keys, t).unflatten(-1, (g, d)).transpose(1, 2) for t in (key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=group.mask, is_causal=group.mask is None, scale=scale, enable_gqa=n != g
            )
            outputs.append(out.transpose(1, 2).reshape(-1, n * d))
        return F.embedding(self.outputs_in_order, outputs[0] if len(outputs) == 1 else torch.cat(outputs))


class _SdpaGroup:
    """A SegmentGroup's index tensors and its mask on the device."""

    def __init__(self, group: SegmentGroup, dtype: torch.dtype, device: torch.device) -> None:
        self.places, self.shape = group.places, group.queries.shape
        self.queries = to_device(group.queries, device)
        self.keys = to_device(group.keys, device)
        self.mask = None
        if group.contexts.any():
            contexts = np.unique(group.contexts)  # one mask for all where they agree
            context = to_device(contexts if len(contexts) == 1 else group.contexts, device)
            rows, columns = (torch.arange(x.shape[1], device=device) for x in (group.queries, group.keys))
            hidden = columns > context.view(-1, 1, 1, 1) + rows.view(-1, 1)
            self.mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _places_of_outputs(groups: list[_SdpaGroup], length: int) -> np.ndarray:
    """int64 [T]: where each token of the stream stands among the groups' outputs, padding included."""
    order = np.full(length, -1, dtype=np.int64)
    offset = 0
    for group in groups:
        rows, columns, tokens = group.places
        order[tokens] = offset + rows * group.shape[1] + columns
        offset += group.shape[0] * group.shape[1]
    assert (order >= 0).all(), "the segments do not cover the stream"
    return order


# -- kernels for sequences of any length, on CUDA ----------------------------------------------------------------------


class VarlenAttend:
    """All segments in one call of a kernel that takes cumulative sequence lengths."""

    def __init__(
        self,
        segments: tuple[Segment, ...],
        length: int,
        device: torch.device,
        kernel: VarlenKernel,
        deterministic: bool = False,
    ) -> None:
        assert sum(s.length for s in segments) == length
        queries = np.array([s.length for s in segments])
        keys = np.array([s.num_context + s.length for s in segments])
        self.kernel, self.deterministic = kernel, deterministic
        ranges = [r for s in segments for r in (*s.context, (s.start, s.length))]
        index = np.concatenate([np.arange(start, start + count) for start, count in ranges])
        self.keys = to_device(index, device)
        self.cu_queries, self.cu_keys = (
            to_device(np.concatenate([[0], x.cumsum()]).astype(np.int32), device) for x in (queries, keys)
        )
        self.max_queries, self.max_keys = int(queries.max()), int(keys.max())

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        groups = key.shape[1:]
        key, value = (F.embedding(self.keys, t.flatten(1)).unflatten(-1, groups) for t in (key, value))
        out = self.kernel(query.contiguous(), key, value, self, scale)
        return out.reshape(query.size(0), -1)


def _parameters(function: Callable[..., object]) -> frozenset[str]:
    """Names of what a function takes; asked once, as versions of a package differ."""
    if function not in _parameters_of:
        _parameters_of[function] = frozenset(inspect.signature(function).parameters)
    return _parameters_of[function]


_parameters_of: dict[Callable[..., object], frozenset[str]] = {}


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: VarlenAttend, scale: float | None) -> Tensor:
    """torch's, from 2.9 on. It is deterministic where `torch.use_deterministic_algorithms` asks for that."""
    from torch.nn.attention import varlen

    function: Callable[..., Any] = varlen.varlen_attn
    accepted = _parameters(function)
    options: dict[str, object] = {}
    if "window_size" in accepted:
        options["window_size"] = (-1, 0)
    else:  # 2.9 and 2.10
        options["is_causal"] = True
    if "scale" in accepted:
        options["scale"] = scale
    elif scale is not None:
        q = q * (scale * math.sqrt(q.size(-1)))
    if "enable_gqa" in accepted:
        options["enable_gqa"] = q.size(1) != k.size(1)
    elif q.size(1) != k.size(1):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    out: Tensor = function(
        q, k, v, lengths.cu_queries, lengths.cu_keys, lengths.max_queries, lengths.max_keys, **options
    )  # fmt: skip
    return out


def _flash(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: VarlenAttend, scale: float | None
) -> Tensor:
    """The function that FlashAttention 2, 3 and 4 have in common. Some versions also return the normalisers."""
    accepted = _parameters(function)
    options: dict[str, object] = {"max_seqlen_q": lengths.max_queries, "max_seqlen_k": lengths.max_keys}
    options = {name: value for name, value in options.items() if name in accepted}  # FlashAttention 4 had neither
    if lengths.deterministic:
        if "deterministic" not in accepted:
            raise NotImplementedError("has no deterministic backward")
        options["deterministic"] = True
    out = function(
        q, k, v, cu_seqlens_q=lengths.cu_queries, cu_seqlens_k=lengths.cu_keys,
        softmax_scale=scale, causal=True, **options,
    )  # fmt: skip
    output: Tensor = out[0] if isinstance(out, tuple) else out
    return output


def _flash_2(q: Tensor, k: Tensor, v: Tensor, lengths: VarlenAttend, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, lengths, scale)


def _flash_3(q: Tensor, k: Tensor, v: Tensor, lengths: VarlenAttend, scale: float | None) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, lengths, scale)


def _flash_4(q: Tensor, k: Tensor, v: Tensor, lengths: VarlenAttend, scale: float | None) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, lengths, scale)


def _transformer_engine(q: Tensor, k: Tensor, v: Tensor, lengths: VarlenAttend, scale: float | None) -> Tensor:
    return _te_module(q.size(1), k.size(1), q.size(2), scale)(
        q, k, v, cu_seqlens_q=lengths.cu_queries, cu_seqlens_kv=lengths.cu_keys,
        max_seqlen_q=lengths.max_queries, max_seqlen_kv=lengths.max_keys,
    )  # fmt: skip


@functools.cache
def _te_module(heads: int, groups: int, channels: int, scale: float | None) -> nn.Module:
    """It is deterministic where torch is told to be when it is made, or refuses."""
    # What it would fall back to takes memory by the square of the length, which a short trial does not show.
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, channels, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right", softmax_scale=scale,
    )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel for sequences of any length on CUDA."""

    module: str
    """What has to be importable."""
    call: VarlenKernel
    majors: tuple[int, ...] = ()
    """Major numbers of the compute capabilities that it is made for; none: all from 8 on."""


VARLEN_KERNELS: dict[str, Kernel] = {
    "flash": Kernel("flash_attn", _flash_2),
    "flash3": Kernel("flash_attn_interface", _flash_3, (9,)),
    "flash4": Kernel("flash_attn.cute", _flash_4, (9, 10, 11)),
    "te": Kernel("transformer_engine", _transformer_engine),
    "varlen": Kernel("torch.nn.attention.varlen", _torch_varlen),
}
"""By their names in --attention-backend: FlashAttention 2, 3 and 4, TransformerEngine's, and torch's own, which is
FlashAttention 2 as well."""
