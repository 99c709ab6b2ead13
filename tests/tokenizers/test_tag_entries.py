"""Forking tokens in the tokenizer files of an export."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.hf.assets import find_tokenizer, write_assets
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_folders import (
    CONFIG,
    assert_export_is_right,
    but_forking_tokens,
    checkpoint,
    edit,
    files,
    special_tags,
)
from tests.helpers.hf_models import qwen_tokenizer


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "qwen3"])
def test_tags_in_a_byte_level_tokenizer(tmp_path, model, decoder):
    source = checkpoint(tmp_path / "in", model_type=model)
    if decoder:  # as transformers 4 wrote it
        entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        listed = {
            str(i): {"content": t, **entry} for i, t in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        }
        edit(source / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=listed))
    tags = special_tags(source)
    assert tags.ids == tuple((290 + i,) for i in range(6))
    write_assets(source, tmp_path / "out", tags, 384, "float32")
    assert_export_is_right(source, tmp_path / "out", tags)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert ("295" in config.get("added_tokens_decoder", {})) == decoder


def test_tags_in_a_tokenizer_of_vocabulary_and_merges(tmp_path):
    source = checkpoint(tmp_path / "in", model_type="qwen2")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(m)}\n" for m in model["merges"]))
    (source / "added_tokens.json").write_text('{"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}')
    (source / "tokenizer.json").unlink()
    edit(source / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Qwen2Tokenizer"))
    assert find_tokenizer(source) == ("HuggingFaceTokenizer", source)
    tags = special_tags(source)
    write_assets(source, tmp_path / "out", tags, 384, "float32")
    assert_export_is_right(source, tmp_path / "out", tags)
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text())["<think6>"] == tags.ids[5][0]


def test_ids_come_out_as_given_where_the_vocabulary_has_holes(tmp_path):
    source = checkpoint(tmp_path / "in")
    edit(source / "tokenizer.json", lambda t: t["model"]["vocab"].update({"Ġapples": 1000}))
    tags = special_tags(source)
    assert tags.ids[0] == (1001,)
    write_assets(source, tmp_path / "out", tags, 1024, "float32")
    assert_export_is_right(source, tmp_path / "out", tags)


def test_tags_far_beyond_the_tokenizer_s_last_entry(tmp_path):
    source = checkpoint(tmp_path / "in")
    tags = ForkingTokens(("<think1>", "<think2>"), ((300,), (299,)), "special")
    write_assets(source, tmp_path / "out", tags, 301, "float32")
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "out")).encode("a<think1><think2>")[1:] == [300, 299]


def test_a_plain_entry_of_the_vocabulary_becomes_a_tag(tmp_path):
    """Spelled in the vocabulary, but out of reach of its merges."""
    source = checkpoint(tmp_path / "in")
    edit(source / "tokenizer.json", lambda t: t["model"]["vocab"].update({"<think1>": 290}))
    assert len(build_tokenizer("HuggingFaceTokenizer", str(source)).encode("<think1>")) > 1
    tags = special_tags(source)
    assert tags.ids == tuple((290 + i,) for i in range(6))
    write_assets(source, tmp_path / "out", tags, 384, "float32")
    assert_export_is_right(source, tmp_path / "out", tags)


@pytest.mark.parametrize(
    "change, ids, message",
    [
        (None, (5,), "cannot give '<think1>' the id 5"),
        (None, (400,), "do not fit an embedding of 384 rows"),
        ({"id": 290, "content": "<think1>"}, (291,), "knows '<think1>' as id 290, the model as 291"),
        ({"id": 290, "content": "<pad>"}, (290,), "cannot give '<think1>' the id 290"),
    ],
)
def test_ids_that_cannot_be_are_refused_and_the_target_stays(tmp_path, change, ids, message):
    source = checkpoint(tmp_path / "in")
    if change is not None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        edit(source / "tokenizer.json", lambda t: t["added_tokens"].append({**change, **flags}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(UserError, match=message) as caught:
        write_assets(source, tmp_path / "out", ForkingTokens(("<think1>",), (ids,), "special"), 384, "float32")
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "out") == {"config.json": b"old"}


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_tokenizer_that_does_not_return_the_tags_is_refused(tmp_path, flag):
    """Tags that it knows already, but finds only in some places, or takes the neighbours of."""
    tags = special_tags(checkpoint(tmp_path / "in"))
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False), flag: True}
    entries = [{"id": ids[0], "content": tag, **flags} for tag, ids in zip(tags.strings, tags.ids)]
    edit(tmp_path / "in" / "tokenizer.json", lambda t: t["added_tokens"].extend(entries))
    with pytest.raises(UserError, match="in: the exported tokenizer would be wrong: .*'<think1>'"):
        write_assets(tmp_path / "in", tmp_path / "out", tags, 384, "float32")
    assert files(tmp_path / "out") == {}


def test_text_tags_of_another_tokenizer_are_refused(tmp_path):
    text = ForkingTokens(("<think1>\n",), ((7, 8),), "text")
    with pytest.raises(UserError, match=r"it encodes '<think1>\\n' as \[.*\] instead of \[7, 8\]"):
        write_assets(checkpoint(tmp_path / "in"), tmp_path / "out", text, 384, "float32")


def test_tags_beside_reserved_special_tokens_that_are_kept(tmp_path):
    """Entries that the checkpoint reserves serve as tags as they are."""
    source = checkpoint(tmp_path / "in")
    tags = ForkingTokens(("<|im_start|>", "<|endoftext|>"), ((1,), (0,)), "special")
    write_assets(source, tmp_path / "out", tags, 290, "float32")
    assert but_forking_tokens(tmp_path / "out") == files(source)


def test_tags_in_qwen_s_tokenizer(tmp_path):
    """The real one: its ids of ordinary text are known, and the embedding has rows to spare."""
    source, target = tmp_path / "in", tmp_path / "out"
    if qwen_tokenizer(source) is None:
        pytest.skip("the package dashscope is not installed")
    (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen2", "vocab_size": 151936}))
    tags = ForkingTokens(("<think1>", "<think2>"), ((151646,), (151647,)), "special")
    write_assets(source, target, tags, 151936, "float32")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(target))
    assert tokenizer.encode("Hello, world!<think2>system\n") == [9707, 11, 1879, 0, 151647, 8948, 198]
    assert tokenizer.encode("<think3>\n<|im_end|>") == [13708, 766, 18, 397, 151645]
