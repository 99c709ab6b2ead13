"""Megatron tensors against Hugging Face ones: transformers' own small models, an independent assembly, any split."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
import transformers

from megatron_ssft.config import ModelConfig
from megatron_ssft.hf.families import FAMILIES, model_values
from megatron_ssft.hf.tensor_map import hf_tensors, megatron_tensors, segments, sources
from tests.helpers.plain_gpt import PlainGPT

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
VARIANTS = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 6}),
    "llama wide heads": ("Llama", {"head_dim": 8, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
}


def build(variant):
    """(transformers' model with every weight random, its tensors as a file has them, our ModelConfig)."""
    family, changes = VARIANTS[variant]
    torch.manual_seed(len(variant))
    hf = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | changes))
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    written = hf.config.to_dict() | {"architectures": [type(hf).__name__]}
    model = ModelConfig(**model_values(written, "config.json"))
    state = dict(hf.state_dict())
    if hf.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return hf, state, model


@pytest.fixture(params=VARIANTS)
def built(request):
    return build(request.param)


def assemble(key, layer, model, state, rows, columns):
    """The rows of a Megatron tensor out of their sources; what has none stays NaN."""
    out = torch.full((len(rows), *([] if columns is None else [columns])), float("nan"))
    for name, hf_rows, start in sources(key, layer, model, rows):
        values = state[name][hf_rows]
        out[start : start + len(values)] = values
    return out


def whole(tensor, model, state):
    return assemble(tensor.key, tensor.layer, model, state, range(tensor.shape[0]), (*tensor.shape, None)[1])


def expected(tensor, model, state):
    """The same tensor by torch's own reshaping, from the definition of the two formats."""
    i = tensor.layer
    attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
    name = tensor.key.removeprefix("decoder.layers.")
    if name.startswith("self_attention.linear_qkv.") and "layer_norm" not in name:
        kind = name.rsplit(".")[-1]
        parts = [state[f"{attention}{p}_proj.{kind}"] for p in "qkv"]
        columns = parts[0].shape[1:]
        grouped = [p.reshape(model.num_query_groups, -1, model.kv_channels, *columns) for p in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *columns)
    if name == "mlp.linear_fc1.weight":
        return torch.cat([state[mlp + "gate_proj.weight"], state[mlp + "up_proj.weight"]])
    return state[
        {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "self_attention.linear_qkv.layer_norm_weight": f"model.layers.{i}.input_layernorm.weight",
            "self_attention.linear_proj.weight": attention + "o_proj.weight",
            "self_attention.q_layernorm.weight": attention + "q_norm.weight",
            "self_attention.k_layernorm.weight": attention + "k_norm.weight",
            "mlp.linear_fc1.layer_norm_weight": f"model.layers.{i}.post_attention_layernorm.weight",
            "mlp.linear_fc2.weight": mlp + "down_proj.weight",
        }[name]
    ]


def test_every_family_is_tried():
    assert {f"{family}ForCausalLM" for family, _ in VARIANTS.values()} == set(FAMILIES)


def test_names_and_shapes_are_those_of_transformers(built):
    _, state, model = built
    assert hf_tensors(model) == {name: tuple(value.shape) for name, value in state.items()}


def test_assembly_is_what_the_formats_define(built):
    _, state, model = built
    for tensor in megatron_tensors(model):
        assert tuple(expected(tensor, model, state).shape) == tensor.shape
        assert torch.equal(whole(tensor, model, state), expected(tensor, model, state)), tensor


def test_splitting_gives_back_every_bit(built):
    _, state, model = built
    back = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    for tensor in megatron_tensors(model):
        values = whole(tensor, model, state)
        parts = segments(tensor.key, tensor.layer, model)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]  # in order, without gaps
        assert parts[-1].stop == tensor.shape[0]
        for part in parts:
            back[part.name][part.hf_start : part.hf_start + part.stop - part.start] = values[part.start : part.stop]
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_every_row_is_used_exactly_once(built):
    _, state, model = built
    used = Counter()
    for tensor in megatron_tensors(model):
        for name, rows, _ in sources(tensor.key, tensor.layer, model, range(tensor.shape[0])):
            used.update((name, row) for row in range(rows.start, rows.stop))
    assert used == Counter((name, row) for name, value in state.items() for row in range(len(value)))


def test_any_slice_of_rows_is_that_slice_of_the_whole(built):
    """Contiguous parts of any size, so every tensor-parallel split of QKV, of gate and of up, at any rank."""
    _, state, model = built
    pick = random.Random(5)
    for tensor in megatron_tensors(model):
        values, rows = whole(tensor, model, state), tensor.shape[0]
        columns = (*tensor.shape, None)[1]
        even = [range(r * rows // n, (r + 1) * rows // n) for n in (1, 2, 3, 4, 6) for r in range(n)]
        odd = [range(*sorted(pick.sample(range(rows + 1), 2))) for _ in range(20)]
        for part in even + odd:
            read = assemble(tensor.key, tensor.layer, model, state, part, columns)
            assert torch.equal(read, values[part.start : part.stop]), (tensor, part)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("multiple", [1, 16, 128])
def test_padding_rows_of_the_vocabulary_have_no_source(tp, multiple):
    _, state, model = build("qwen2 untied")
    share = -(-model.vocab_size // (tp * multiple)) * multiple
    for key, name in (("embedding.word_embeddings.weight", "model.embed_tokens.weight"), ("output_layer.weight",) * 2):
        table = state["lm_head.weight" if name == key else name]
        ranks = [assemble(key, None, model, state, range(r * share, (r + 1) * share), 24) for r in range(tp)]
        padded = torch.cat(ranks)
        assert torch.equal(padded[: model.vocab_size], table)
        assert padded[model.vocab_size :].isnan().all()


def test_the_tensors_of_one_megatron_tensor_follow_each_other(built):
    """An export holds one Megatron tensor at a time and writes its parts in the order of the file."""
    _, _, model = built
    order = [s.name for t in megatron_tensors(model) for s in segments(t.key, t.layer, model)]
    assert list(dict.fromkeys(order)) == list(hf_tensors(model))
    names = list(hf_tensors(model))
    assert names[0] == "model.embed_tokens.weight"
    tail = (
        ["model.norm.weight", "lm_head.weight"] if model.untie_embeddings_and_output_weights else ["model.norm.weight"]
    )
    assert names[-len(tail) :] == tail


def test_logits_from_the_assembled_tensors():
    """A GPT written from the definition of the layout, fed with assembled tensors, answers like transformers."""
    hf, state, model = build("llama tied")
    weights = {
        t.key if t.layer is None else f"{t.key}/{t.layer}": whole(t, model, state).numpy()
        for t in megatron_tensors(model)
    }
    plain = PlainGPT(weights, model.num_layers, model.num_attention_heads, model.num_query_groups)
    ids = [3, 1, 36, 7, 7, 20, 11, 0]
    with torch.no_grad():
        torch.testing.assert_close(
            plain.logits(ids, model.vocab_size), hf(torch.tensor([ids])).logits[0], atol=1e-5, rtol=1e-5
        )


def test_tensors_a_model_does_not_have_are_no_question():
    _, _, model = build("llama tied")
    for key, layer in (
        ("decoder.layers.self_attention.linear_qkv.bias", 0),
        ("decoder.layers.self_attention.q_layernorm.weight", 0),
        ("output_layer.weight", None),
        ("embedding.word_embeddings.weight", 0),
        ("decoder.layers.mlp.linear_fc2.weight", None),
    ):
        with pytest.raises(AssertionError):
            segments(key, layer, model)
