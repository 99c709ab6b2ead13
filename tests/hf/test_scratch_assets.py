"""config.json and tokenizer for a run that did not start from a Hugging Face folder."""

from __future__ import annotations

import json
import random

import pytest
import torch

from megatron_ssft.config import ModelConfig
from megatron_ssft.hf.families import model_values
from megatron_ssft.hf.scratch_assets import NotExpressible, check_tokenizer, hf_config
from megatron_ssft.tokenizers.exported_tags import read_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer, HuggingFaceTokenizer
from tests.helpers.hf_folders import edit, sentencepiece_checkpoint
from tests.helpers.hf_models import chatml_tokenizer
from tests.helpers.scratch_folders import DEMO, FAMILY, INEXPRESSIBLE, SHAPES, random_texts, scratch

# -- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILY)
def test_the_model_comes_back_from_its_config_json(tmp_path, family, shape):
    """By our own reading, and by that of transformers, which must compute with the same numbers."""
    from transformers import AutoConfig

    model = ModelConfig(**DEMO | FAMILY[family] | SHAPES[shape])
    written = hf_config(model, 263, 96, "bfloat16")
    values = model_values(written, "config.json")
    assert values.pop("vocab_size") == 263
    for name, value in values.items():
        assert value == getattr(model, name) and type(value) is type(getattr(model, name)), name
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.model_type == family and read.torch_dtype == torch.bfloat16
    assert read.rope_parameters["rope_theta"] == model.rotary_base
    assert read.max_position_embeddings == 96 and read.tie_word_embeddings == (shape != "untied")


@pytest.mark.parametrize("flag", INEXPRESSIBLE)
def test_what_no_family_computes_is_refused_by_its_flag(flag):
    with pytest.raises(NotExpressible, match=f"none of .* has {flag}; a model") as caught:
        hf_config(ModelConfig(**DEMO | INEXPRESSIBLE[flag]), 263, 96, "float32")
    assert "\n" not in str(caught.value)


# -- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_char_tokenizer_is_exact(tmp_path, family):
    ours, tags, size = scratch(tmp_path, **FAMILY[family])
    assert size == 263 and tags.ids == tuple((257 + i,) for i in range(6))
    for folder in ("hf", "export"):
        theirs = HuggingFaceTokenizer(str(tmp_path / folder))
        assert (theirs.eos_id, theirs.bos_id, theirs.token_to_id("a")) == (256, None, 97)
        for text in random_texts(500):
            assert theirs.encode(text) == ours.encode(text), text
        rng = random.Random(1)
        for ids in [[i] for i in range(257)] + [[rng.randrange(257) for _ in range(40)] for _ in range(500)]:
            assert theirs.decode(ids) == ours.decode(ids), ids
        every = "".join(map(chr, [*range(0x1000), *range(0x1000, 0xD800, 7), *range(0xE000, 0x110000, 37)]))
        assert theirs.encode(every) == ours.encode(every) and theirs.decode(theirs.encode(every)) == every
    assert HuggingFaceTokenizer(str(tmp_path / "hf")).vocab_size == 257
    assert theirs.encode("a<think6>b<think7>")[1:3] == [262, ord("b")]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_sentencepiece_gives_the_same_ids(tmp_path, model_type, family):
    folder = sentencepiece_checkpoint(tmp_path / "sp", model_type, shuffle=model_type == "bpe")
    source = (folder / "tokenizer.model").rename(tmp_path / "pieces.model")
    kind = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(source)}
    ours, tags, _ = scratch(tmp_path, **kind, **FAMILY[family])
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == source.read_bytes()
    for folder in ("hf", "export"):
        theirs = HuggingFaceTokenizer(str(tmp_path / folder))
        assert (theirs.eos_id, theirs.bos_id) == (ours.eos_id, ours.bos_id) == (2, 1)
        control = ["1</s>2", "<unk><s>"] if model_type == "bpe" else []
        for text in [*random_texts(500), *control, "a  b", "Question 7: what is 9?"]:
            assert theirs.encode(text) == ours.encode(text), text
    assert read_forking_tokens(tmp_path / "export") == tags


def test_sentencepiece_that_cannot_be_written_is_refused(tmp_path):
    folder = sentencepiece_checkpoint(tmp_path / "sp", symbols=["[INST]"])
    kind = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(folder / "tokenizer.model")}
    with pytest.raises(NotExpressible, match=r"--tokenizer-model .*sp/tokenizer\.model: user-defined pieces"):
        scratch(tmp_path, **kind)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hugging_face_tokenizer_keeps_its_files_or_at_least_its_ids(tmp_path, family, named):
    """Where only the folder's own config.json named its class, it is written down."""
    source = chatml_tokenizer(tmp_path / "gpt2")
    if not named:
        edit(source / "tokenizer_config.json", lambda c: c.pop("tokenizer_class"))
        (source / "config.json").write_text('{"model_type": "gpt2"}')
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    kind = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(source)}
    ours, tags, _ = scratch(tmp_path, **kind, **FAMILY[family])
    if named:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    theirs = HuggingFaceTokenizer(str(tmp_path / "export"))
    for text in random_texts(500):
        assert theirs.encode(text) == ours.encode(text), text
    chat = [{"role": "user", "content": "1 + 1?"}]
    assert theirs.render_chat(chat) == ours.render_chat(chat) is not None
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == ours.eos_id == 2
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2, "pad_token_id": 0}
    assert read_forking_tokens(tmp_path / "export") == tags


def test_special_ids_of_the_byte_tokenizer(tmp_path):
    scratch(tmp_path)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 256, None)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (263, 96)
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 256, "pad_token_id": 256}


def test_a_tokenizer_that_transformers_would_read_otherwise_is_noticed(tmp_path):
    scratch(tmp_path)
    edit(tmp_path / "export" / "tokenizer.json", lambda t: t.update(normalizer={"type": "NFC"}))
    with pytest.raises(NotExpressible, match="of a llama model by rules of its own, and then it encodes"):
        check_tokenizer(tmp_path / "export", CharTokenizer())
    edit(tmp_path / "export" / "tokenizer_config.json", lambda c: c.update(eos_token="<think1>"))
    with pytest.raises(NotExpressible, match="its eos_id is 257 instead of 256"):
        check_tokenizer(tmp_path / "export", CharTokenizer())
