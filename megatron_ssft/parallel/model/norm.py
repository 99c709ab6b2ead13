"""The normalisation put into megatron-core's local layer spec."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ssft.parallel.model.marks import mark


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
            mark(parameter, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:  # scaled after rounding back, as Llama and Qwen do
            return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
