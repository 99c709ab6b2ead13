"""Layers put into megatron-core's local layer spec: a normalisation and a causal core attention.

Shapes: s sequence, b batch, h hidden, n query heads and g key/value groups on this tensor-parallel rank, d channels
of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in float32, usable under sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism. All it takes is to mark the weights: each
    tensor-parallel rank then sees part of the sequence, and their gradients are summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:  # scaled after rounding back, as Llama and Qwen do
            return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class CausalAttention(nn.Module):
    """Causal scaled-dot-product attention through torch's kernels (flash on CUDA, fused on CPU).

    Sequences are padded on the right, so the causal mask alone keeps real tokens from seeing padding.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]. `attention_mask` must be None."""
        assert attention_mask is None, "the causal mask is built in"
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=k.size(1) != q.size(1)
        )
        return context.permute(2, 0, 1, 3).flatten(2)
