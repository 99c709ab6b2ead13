"""config.json to model shape: as transformers writes it, as the published checkpoints have it, and what is refused."""

from __future__ import annotations

import json

import pytest
import transformers

from megatron_ssft.config import ModelConfig
from megatron_ssft.errors import UserError
from megatron_ssft.hf import families
from megatron_ssft.hf.families import FAMILIES, model_values

WHERE = "folder/config.json"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_window_layers": 64,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_llama():
    assert model_values(LLAMA, WHERE) == {
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "kv_channels": 64,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": False,
        "rotary_base": 100000.0,
        "rotary_percent": 1.0,
        "vocab_size": 49152,
    }


@pytest.mark.parametrize(
    ("config", "differences"),
    [
        (MISTRAL, {"add_qkv_bias": False, "qk_layernorm": False, "untie_embeddings_and_output_weights": True}),
        (QWEN2, {"add_qkv_bias": True, "qk_layernorm": False, "kv_channels": 128, "norm_epsilon": 1e-6}),
        (QWEN3, {"add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 128, "rotary_base": 1e6}),
    ],
)
def test_other_families(config, differences):
    values = model_values(config, WHERE)
    assert {name: values[name] for name in differences} == differences
    ModelConfig(**values)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_writes(name, tmp_path):
    """Saved by the installed release, the shape is the one its model is built with."""
    prefix = name.removesuffix("ForCausalLM")
    extra = {"sliding_window": None} if prefix == "Mistral" else {}
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 54321.0},
        **extra,
    )
    hf = getattr(transformers, name)(config)
    hf.save_pretrained(tmp_path)
    values = model_values(json.loads((tmp_path / "config.json").read_text()), WHERE)
    assert values["rotary_base"] == 54321.0
    assert values["kv_channels"] == 16 == hf.model.layers[0].self_attn.head_dim
    assert values["num_query_groups"] * 16 == hf.model.layers[0].self_attn.k_proj.out_features
    assert values["norm_epsilon"] == hf.model.norm.variance_epsilon
    assert values["add_qkv_bias"] == (hf.model.layers[0].self_attn.q_proj.bias is not None)
    assert hf.model.layers[0].self_attn.o_proj.bias is None
    assert values["qk_layernorm"] == hasattr(hf.model.layers[0].self_attn, "q_norm")
    assert not values["untie_embeddings_and_output_weights"]


@pytest.mark.parametrize(
    ("config", "base"),
    [
        (without(LLAMA, "rope_theta"), 10000.0),
        (without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        (without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        (LLAMA | {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, 1e5),
        (LLAMA | {"rope_scaling": {"type": "default"}}, 1e5),
        (LLAMA | {"rope_scaling": {}, "partial_rotary_factor": 1.0}, 1e5),
    ],
)
def test_rotary_base(config, base):
    assert model_values(config, WHERE)["rotary_base"] == base


def test_defaults_that_the_first_llama_relies_on():
    values = model_values(
        without(LLAMA, "num_key_value_heads", "rope_theta", "tie_word_embeddings", "model_type"), WHERE
    )
    assert values["num_query_groups"] == 9
    assert values["untie_embeddings_and_output_weights"]
    assert model_values(QWEN2 | {"num_key_value_heads": None}, WHERE)["num_query_groups"] == 40


@pytest.mark.parametrize(
    "config",
    [
        QWEN2,  # a window is given, and switched off
        without(QWEN2, "use_sliding_window"),
        QWEN2 | {"use_sliding_window": True, "sliding_window": None},
        QWEN2 | {"use_sliding_window": True},  # from layer 64 of 64 on
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 64},
        LLAMA | {"sliding_window": 128},  # no such thing in Llama
    ],
)
def test_windows_that_change_nothing_are_fine(config):
    model_values(config, WHERE)


ROPE = "rope_scaling", "rope_parameters"
REFUSED = [
    (LLAMA | {"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", *FAMILIES]),
    (LLAMA | {"architectures": ["Qwen2ForSequenceClassification"]}, ["Qwen2ForSequenceClassification"]),
    (without(LLAMA, "architectures"), ["architectures", *FAMILIES]),
    (LLAMA | {"architectures": None}, ["architectures"]),
    (LLAMA | {"architectures": []}, ["architectures"]),
    (LLAMA | {"architectures": "LlamaForCausalLM"}, ["architectures"]),
    (LLAMA | {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, ["architectures"]),
    (LLAMA | {"model_type": "mistral"}, ["model_type", "mistral", "LlamaForCausalLM"]),
    *((LLAMA | {key: {"rope_type": kind, "factor": 8.0}}, [kind, key])
      for key in ROPE for kind in ("llama3", "yarn", "linear", "dynamic", "longrope", "proportional")),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear"]),  # the older spelling
    (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters"]),
    (LLAMA | {"rope_scaling": "linear"}, ["rope_scaling", "linear"]),
    (LLAMA | {"rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "100000", "500000"]),
    (LLAMA | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor", "0.25"]),
    (LLAMA | {"rope_theta": "1e4"}, ["rope_theta"]),
    (LLAMA | {"rope_theta": -1}, ["rope_theta"]),
    (MISTRAL | {"sliding_window": 4096}, ["sliding", "4096"]),
    (without(MISTRAL, "sliding_window"), ["sliding_window"]),
    (without(MISTRAL, "num_key_value_heads"), ["num_key_value_heads"]),
    (without(QWEN2, "num_key_value_heads"), ["num_key_value_heads"]),
    (without(QWEN3, "head_dim"), ["head_dim"]),
    (QWEN2 | {"use_sliding_window": True, "max_window_layers": 28}, ["sliding", "131072", "28"]),
    (without(QWEN2 | {"use_sliding_window": True}, "max_window_layers", "sliding_window"), ["sliding", "4096"]),
    (QWEN3 | {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
    (LLAMA | {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    (LLAMA | {"attention_bias": True}, ["attention_bias"]),
    (LLAMA | {"mlp_bias": True}, ["mlp_bias"]),
    (LLAMA | {"attention_bias": "no"}, ["attention_bias"]),
    (QWEN3 | {"attention_bias": True}, ["attention_bias"]),
    (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantized", "gptq"]),
    (LLAMA | {"num_key_value_heads": 2}, ["num_key_value_heads", "9"]),
    (LLAMA | {"hidden_size": 577}, ["hidden_size", "577"]),
    (LLAMA | {"vocab_size": 0}, ["vocab_size"]),
    (LLAMA | {"vocab_size": True}, ["vocab_size"]),
    (LLAMA | {"num_hidden_layers": 30.0}, ["num_hidden_layers"]),
    (LLAMA | {"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
    (LLAMA | {"tie_word_embeddings": "true"}, ["tie_word_embeddings"]),
    *((without(LLAMA, key), [key, "missing"]) for key in (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size")),
]  # fmt: skip


@pytest.mark.parametrize(("config", "names"), REFUSED)
def test_refused_in_one_line_that_names_it(config, names):
    with pytest.raises(UserError) as caught:
        model_values(config, WHERE)
    text = str(caught.value)
    assert text.startswith(f"{WHERE}: ") and "\n" not in text
    for name in names:
        assert name in text


@pytest.mark.parametrize("architecture", families.FAMILIES)
def test_positions_without_a_word_are_those_of_transformers(architecture):
    from transformers import AutoConfig

    family = families.FAMILIES[architecture]
    stored = {"architectures": [architecture]} | dict.fromkeys(family.required)
    default = AutoConfig.for_model(family.model_type).max_position_embeddings
    assert families.max_positions(stored, "config.json") == default
    assert families.max_positions(stored | {"max_position_embeddings": 77}, "config.json") == 77
    for wrong in (0, -1, "512", 2.5, True):
        with pytest.raises(UserError, match='^config.json: "max_position_embeddings"'):
            families.max_positions(stored | {"max_position_embeddings": wrong}, "config.json")
