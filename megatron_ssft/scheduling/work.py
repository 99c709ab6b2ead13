"""Work of a forward pass: FLOPs from counts, for balancing ranks and for accounting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ssft.config import ModelConfig
from megatron_ssft.records import Microbatch, SequenceSpec, Size


@dataclass(frozen=True)
class WorkModel:
    """work = token * tokens + pair * pairs + scored * scored positions: linear layers, core attention, output head."""

    token: float
    """FLOPs of a token in everything but core attention and head."""
    pair: float
    """FLOPs of a pair (query, key) in core attention, over all layers."""
    scored: float
    """FLOPs of a position in the output head."""

    @classmethod
    def for_model(cls, model: ModelConfig, vocab_size: int, attention_efficiency: float = 1.0) -> WorkModel:
        """FLOPs of matrix products (2 per multiply-add) in one forward pass; norms, rotations, softmax are left out.

        Backward doubles all three terms; tensor and pipeline parallelism divide them.

        Args:
            attention_efficiency: speed of core attention over that of the other matrix products, in FLOP/s. 1 counts
                FLOPs; a measured value makes the work proportional to time.
        """
        layers, hidden, heads = model.num_layers, model.hidden_size, model.num_attention_heads
        groups, channels, ffn = model.num_query_groups, model.kv_channels, model.ffn_hidden_size
        assert layers and hidden and heads and groups and channels and ffn, "a configuration has its defaults filled in"
        query_width, kv_width = heads * channels, groups * channels
        attention = hidden * (2 * query_width + 2 * kv_width)  # Q and output; K and V
        mlp = (3 if model.swiglu else 2) * hidden * ffn
        return cls(
            token=2.0 * layers * (attention + mlp),
            pair=2.0 * layers * 2 * query_width / attention_efficiency,  # scores and values
            scored=2.0 * hidden * vocab_size,
        )

    def of(self, size: Size) -> float:
        """Work of a forward pass of this size."""
        return self.token * size.tokens + self.pair * size.pairs + self.scored * size.scored


def padded_size(sequences: Iterable[SequenceSpec]) -> Size:
    """Size of a microbatch in the padded layout, where every sequence costs what the longest does."""
    lengths = [s.num_tokens for s in sequences]
    rows, longest = len(lengths), max(lengths)
    return Size(rows * longest, rows * longest * (longest + 1) // 2, sum(s.num_scored for s in sequences))


def padded_microbatch(sequences: Iterable[SequenceSpec]) -> Microbatch:
    """The sequences as a microbatch in the padded layout."""
    sequences = tuple(sequences)
    return Microbatch(sequences, padded_size(sequences))
