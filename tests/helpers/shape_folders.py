"""Hugging Face folders that are nothing but the shape of a published model."""

from __future__ import annotations

import json
from pathlib import Path

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "torch_dtype": "bfloat16",
}
_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SHAPES = {"32b": (64, 5120, 27648, 40, 8), "7b": (28, 3584, 18944, 28, 4)}
"""Of Qwen2.5's models."""


def shape_folder(folder: Path, size: str) -> Path:
    """config.json of a Qwen2.5 model, without weights, and an empty file in the tokenizer's place."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_QWEN | dict(zip(_KEYS, SHAPES[size]))))
    (folder / "tokenizer.json").write_text("{}")
    return folder
