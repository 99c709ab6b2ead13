"""How much work a sequence is, for balancing only: what counts is the ratio of the terms."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.config import ModelConfig
from megatron_ssft.records import Microbatch


@dataclass(frozen=True)
class WorkModel:
    """work(n) = linear * n + quadratic * n^2 for one sequence of n tokens."""

    linear: float
    """Work of a token in everything but core attention."""
    quadratic: float
    """Work of core attention over the square of the length."""

    @classmethod
    def for_model(cls, model: ModelConfig, vocab_size: int) -> WorkModel:
        """Work in units of one token's linear work, from the floating-point operations of the layers.

        Backward and recompute multiply both terms alike, tensor and pipeline parallelism divide them alike. Causal
        attention looks at n^2 / 2 pairs of tokens.
        """
        query_width = model.num_attention_heads * model.kv_channels
        kv_width = model.num_query_groups * model.kv_channels
        attention = model.hidden_size * (2 * query_width + 2 * kv_width)  # Q and output; K and V
        mlp = (3 if model.swiglu else 2) * model.hidden_size * model.ffn_hidden_size
        linear = 2 * (model.num_layers * (attention + mlp) + model.hidden_size * vocab_size)
        pair = 2 * model.num_layers * 2 * query_width  # scores and values
        return cls(linear=1.0, quadratic=pair / 2 / linear)

    def sequence(self, num_tokens: int) -> float:
        """Work of one sequence."""
        return self.linear * num_tokens + self.quadratic * num_tokens * num_tokens

    def padded(self, num_sequences: int, longest: int) -> float:
        """Work of a microbatch in the padded layout, where every sequence costs what the longest does."""
        return num_sequences * self.sequence(longest)

    def microbatch(self, microbatch: Microbatch) -> float:
        """Work of a microbatch in the padded layout."""
        return self.padded(len(microbatch.sequences), max(s.num_tokens for s in microbatch.sequences))
