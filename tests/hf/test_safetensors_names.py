"""Which tensors a folder must have: missing, unused and misshapen ones are named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_ssft.hf import safetensors_io
from megatron_ssft.hf.safetensors_io import SINGLE, HFWeights
from tests.helpers.safetensors_folders import refusal, tensors

EMBEDDING = "model.embed_tokens.weight"
WANTED = {EMBEDDING: (6, 4), "model.norm.weight": (4,)}


def checked(folder, wanted=WANTED, **changes):
    """check_names on a folder of `wanted` with changes (None removes)."""
    values = tensors(shapes=WANTED)
    for name, value in changes.items():
        values[name.replace("__", ".")] = value
    save_file({name: value for name, value in values.items() if value is not None}, folder / SINGLE)
    with HFWeights(folder) as weights:
        weights.check_names(wanted, str(folder))


def test_matching_names_pass(tmp_path):
    checked(tmp_path)
    checked(tmp_path, **{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(3)})


def test_missing_wrong_and_unused_are_named_together(tmp_path):
    text = refusal(
        lambda: checked(tmp_path, model__norm__weight=None, model__more=torch.ones(2), **{EMBEDDING: torch.ones(6, 5)})
    )
    assert text.startswith(f"{tmp_path}: ")
    assert "missing: model.norm.weight" in text
    assert "unused: model.more" in text
    assert f"{EMBEDDING} [6, 5] instead of [6, 4]" in text


def test_five_are_named_and_the_rest_counted(tmp_path):
    text = refusal(lambda: checked(tmp_path, **{f"extra{i:02d}": torch.ones(1) for i in range(12)}))
    assert "extra04 and 7 more" in text and "extra05" not in text


def test_missing_bias_is_named(tmp_path):
    """A folder without the biases its family has must not load as if they were zero."""
    text = refusal(lambda: checked(tmp_path, WANTED | {"model.layers.0.self_attn.q_proj.bias": (4,)}))
    assert "model.layers.0.self_attn.q_proj.bias" in text


@pytest.mark.parametrize("block", [1, 16, 40, 1 << 24])
def test_head_beside_tied_embeddings(tmp_path, monkeypatch, block):
    monkeypatch.setattr(safetensors_io, "_COMPARED_AT_ONCE", block)
    table = tensors(shapes=WANTED)[EMBEDDING]
    checked(tmp_path, lm_head__weight=table.clone())
    for row in range(6):
        other = table.clone()
        other[row, 3] = torch.nextafter(other[row, 3], torch.tensor(9.0))
        assert "lm_head.weight differs" in refusal(lambda other=other: checked(tmp_path, lm_head__weight=other))
    for other in (table[:5].clone(), table.bfloat16()):
        assert "lm_head.weight differs" in refusal(lambda other=other: checked(tmp_path, lm_head__weight=other))


def test_bits_decide_not_values(tmp_path):
    """0 and -0 are equal as numbers; NaN equals itself as bits."""
    table = tensors(shapes=WANTED)[EMBEDDING]
    table[2, 2] = float("nan")
    checked(tmp_path, lm_head__weight=table.clone(), **{EMBEDDING: table})
    table[2, 2] = 0.0
    other = table.clone()
    other[2, 2] = -0.0
    assert "differs" in refusal(lambda: checked(tmp_path, lm_head__weight=other, **{EMBEDDING: table}))


def test_untied_model_needs_its_head(tmp_path):
    assert "missing: lm_head.weight" in refusal(lambda: checked(tmp_path, WANTED | {"lm_head.weight": (6, 4)}))
