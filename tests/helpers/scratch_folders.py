"""Hugging Face files of runs that did not start from a Hugging Face folder."""

from __future__ import annotations

import random

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.hf.scratch_assets import write_scratch_assets
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens, vocab_size_with_tags
from megatron_ssft.tokenizers.tokenizer import build_tokenizer

TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
DEMO = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4}
FAMILY = {
    "llama": {},
    "mistral": {"num_attention_heads": 6, "kv_channels": 16},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
}
TEXT = {"forking_token_format": "text"}
SHAPES = {
    "plain": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "grouped": {"num_query_groups": 2, "kv_channels": 24, "rotary_base": 3e4, "norm_epsilon": 1e-6},
}
INEXPRESSIBLE = {
    "--normalization LayerNorm": {"normalization": "LayerNorm"},
    "--no-swiglu": {"swiglu": False},
    "--add-bias-linear": {"add_bias_linear": True},
    "--rotary-percent 0.5": {"rotary_percent": 0.5},
    "--add-qkv-bias together with --qk-layernorm": {"add_qkv_bias": True, "qk_layernorm": True},
}


def configuration(**values):
    values = {"data_path": ["-"], "train_iters": 1, "tokenizer_type": "CharTokenizer", "seq_length": 96} | values
    return build_config(DEMO | values, SSFTConfig)


def scratch(folder, tags=6, format="special", **values):
    """The files of a run from random weights and, for tags, its export without weights."""
    config = configuration(**values)
    tokenizer = build_tokenizer(config.run.tokenizer.tokenizer_type, config.run.tokenizer.tokenizer_model)
    forking = build_forking_tokens(tokenizer, tags, format, None)
    size = vocab_size_with_tags(tokenizer, forking)
    write_scratch_assets(config.run, tokenizer, size, folder / "hf")
    write_assets(folder / "hf", folder / "export", forking, size, "float32")
    return tokenizer, forking, size


def random_texts(count, seed=0):
    """Texts of all planes, with everything that tokenizers like to treat in a way of its own."""
    rng = random.Random(seed)
    favourites = [
        "<|endoftext|>",
        "e\u0301",
        "\r\n",
        "  ",
        "\u00a0",
        "ﬁ",
        "don't",
        "1234",
        "\t",
        "\x00",
        "\u2581",
        "\ufffd",
    ]
    ranges = [(0, 0x80), (0, 0x300), (0x300, 0x370), (0x20, 0xD800), (0xE000, 0x110000)]
    for _ in range(count):
        parts = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 30))]
        parts += rng.sample(favourites, rng.randint(0, 3))
        rng.shuffle(parts)
        yield "".join(parts)
