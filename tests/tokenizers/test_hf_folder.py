"""Folders with a SentencePiece model alone get a tokenizer.json of the same ids."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.hf.assets import copy_assets, find_tokenizer, write_assets
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_folders import CORPUS, TEXTS, assert_export_is_right, sentencepiece_checkpoint, special_tags
from tests.helpers.hf_models import CHATML


@pytest.mark.parametrize("model", ["llama", "mistral"])
@pytest.mark.parametrize(
    "model_type, shuffle, settings",
    [
        ("bpe", False, None),
        ("bpe", True, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}),
        ("bpe", True, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "chat_template": CHATML}),
        ("unigram", False, {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}),
    ],
)
def test_sentencepiece_alone_keeps_its_ids(tmp_path, model, model_type, shuffle, settings):
    import sentencepiece

    source = sentencepiece_checkpoint(tmp_path / "in", model_type, shuffle, model, settings)
    reference = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    copy_assets(source, tmp_path / "run")
    assert find_tokenizer(tmp_path / "run") == ("HuggingFaceTokenizer", tmp_path / "run")
    tags = special_tags(tmp_path / "run")
    assert tags.ids[0] == (len(reference),)
    write_assets(source, tmp_path / "out", tags, len(reference) + 6, "float32")
    for folder in (tmp_path / "run", tmp_path / "out"):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
        for text in [t for t in TEXTS if t] + [*CORPUS, "a  b    c", "\n\n"]:
            assert tokenizer.encode(text) == reference.encode(text)
            assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
        assert tokenizer.eos_id == reference.eos_id()
        assert tokenizer.bos_id == (None if settings and settings.get("add_bos_token") is False else reference.bos_id())
    assert_export_is_right(tmp_path / "run", tmp_path / "out", tags)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_sentencepiece_with_added_tokens(tmp_path):
    source = sentencepiece_checkpoint(tmp_path / "in", settings={"tokenizer_class": "LlamaTokenizer", "legacy": False})
    import sentencepiece

    size = len(sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")))
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": size, "<user>": size + 1}))
    tags = ForkingTokens(("<think1>",), ((size + 2,),), "special")
    write_assets(source, tmp_path / "out", tags, size + 3, "float32")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "out"))
    assert tokenizer.encode("<pad><user><think1>") == [size, size + 1, size + 2]
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": size + 9}))
    with pytest.raises(UserError, match=f"in: added token '<pad>' cannot get its id {size + 9}"):
        copy_assets(source, tmp_path / "run")


def test_sentencepiece_that_tokenizer_json_cannot_express_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model: user-defined pieces"):
        copy_assets(sentencepiece_checkpoint(tmp_path / "symbols", symbols=["[INST]"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"tokenizer\.model: neither a BPE nor a unigram model"):
        copy_assets(sentencepiece_checkpoint(tmp_path / "words", "word"), tmp_path / "run")


def test_damaged_sentencepiece_model(tmp_path):
    source = sentencepiece_checkpoint(tmp_path / "in")
    for content in (b"", b"not a model", (source / "tokenizer.model").read_bytes()[:-7]):
        (source / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=r"in/tokenizer\.model: not a SentencePiece model"):
            copy_assets(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_folder_with_tokenizer_model_alone_is_read_as_its_export(tmp_path, template):
    """Whatever a run tokenizes with the original, it tokenizes alike with what it exports; chat template included."""
    source = sentencepiece_checkpoint(tmp_path / "sp")
    if template is not None:
        (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    original = build_tokenizer(*map(str, find_tokenizer(source)))
    copy_assets(source, tmp_path / "run")
    exported = build_tokenizer(*map(str, find_tokenizer(tmp_path / "run")))
    for text in [t for t in TEXTS if t] + CORPUS:
        assert original.encode(text) == exported.encode(text)
    chat = [{"role": "user", "content": "1 + 1?"}]
    assert original.render_chat(chat) == exported.render_chat(chat)
    assert (original.render_chat(chat) is None) == (template is None)
    assert (original.eos_id, original.bos_id) == (exported.eos_id, exported.bos_id)
