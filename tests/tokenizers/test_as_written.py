"""tokenizer.json decides which ids a text has, whatever class transformers chooses by the names in a folder."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers

from megatron_ssft.errors import UserError
from megatron_ssft.hf.assets import copy_assets, write_assets
from megatron_ssft.tokenizers.hf_folder import pin_tokenizer_json
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.hf_folders import TEXTS, checkpoint, edit, files, sentencepiece_checkpoint, special_tags
from tests.helpers.hf_models import CHATML
from tests.helpers.scratch_folders import random_texts

PROBES = [*TEXTS, "6 x 7 = 42", " café  au\n\n lait", "e\u0301", "don't 1234", "数学 🦆", "<|im_end|> a", "\u00a0x"]


def sentencepiece_like(folder, model, tokenizer_class):
    """A folder whose tokenizer.json marks spaces as SentencePiece does, and whose other files name another kind."""
    source = sentencepiece_checkpoint(folder.with_name(folder.name + "_source"), settings={"chat_template": CHATML})
    copy_assets(source, folder)
    (folder / "tokenizer.model").unlink()
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class=tokenizer_class))
    edit(folder / "config.json", lambda c: c.update(model_type=model))
    return folder


def lowering(folder, model):
    """A byte-level vocabulary whose tokenizer.json lowers letters first."""
    checkpoint(folder, model_type=model)
    edit(folder / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}))
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Qwen2Tokenizer"))
    return folder


CASES = {
    "qwen2 and pieces": lambda folder: sentencepiece_like(folder, "qwen2", "Qwen2Tokenizer"),
    "qwen3 and pieces": lambda folder: sentencepiece_like(folder, "qwen3", "Qwen2TokenizerFast"),
    "gpt2 and pieces": lambda folder: sentencepiece_like(folder, "llama", "GPT2Tokenizer"),
    "qwen2 and lower case": lambda folder: lowering(folder, "qwen2"),
    "llama and lower case": lambda folder: lowering(folder, "llama"),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_tokenizer_json(tmp_path, case):
    folder = CASES[case](tmp_path / "in")
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(str(folder))
    for text in [*PROBES, *random_texts(60)]:
        assert tokenizer.encode(text) == written.encode(text, add_special_tokens=False).ids, text
    assert tokenizer.remarks and "tokenizer.json" in tokenizer.remarks[0]


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("qwen2")])
def test_an_export_is_read_by_transformers_as_it_was_trained(tmp_path, case):
    from transformers import AutoTokenizer

    folder = CASES[case](tmp_path / "in")
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tags = special_tags(folder, 2)
    write_assets(folder, tmp_path / "out", tags, 500, "float32")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*PROBES, *random_texts(30)]:
        assert (
            exported(text, add_special_tokens=False)["input_ids"] == written.encode(text, add_special_tokens=False).ids
        )
    assert exported("<think2>", add_special_tokens=False)["input_ids"] == [*tags.ids[1]]
    assert exported.eos_token_id == HuggingFaceTokenizer(str(folder)).eos_id


def test_an_export_that_transformers_would_read_otherwise_is_refused(tmp_path):
    """transformers 5 gives every qwen2 model the rules of Qwen2, whatever the files say."""
    from transformers import AutoTokenizer

    folder = CASES["qwen2 and pieces"](tmp_path / "in")
    plain = tmp_path / "plain"
    copy_assets(folder, plain)
    edit(plain / "tokenizer_config.json", lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"))
    if AutoTokenizer.from_pretrained(plain).backend_tokenizer.pre_tokenizer is None:
        pytest.skip("this version of transformers reads the folder as it is written")
    with pytest.raises(
        UserError, match="in: transformers reads the tokenizer of this kind of model by rules"
    ) as caught:
        write_assets(folder, tmp_path / "out", special_tags(folder, 2), 500, "float32")
    assert "\n" not in str(caught.value) and files(tmp_path / "out") == {}


def test_files_that_are_read_as_written_stay_as_they_are(tmp_path):
    for model in ("llama", "qwen2", "qwen3"):
        folder = checkpoint(tmp_path / model, model_type=model)
        before = files(folder)
        pin_tokenizer_json(folder, folder)
        assert files(folder) == before and HuggingFaceTokenizer(str(folder)).remarks == ()


def test_added_tokens_that_two_files_describe_differently_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "in")
    entry = {"content": "<|im_end|>", "lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
    edit(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"2": entry | {"special": True}}))
    with pytest.raises(UserError, match="tokenizer.json and tokenizer_config.json contradict each other") as caught:
        HuggingFaceTokenizer(str(folder))
    assert str(caught.value).startswith(f"--tokenizer-model {folder}: ") and "\n" not in str(caught.value)


def test_random_vocabularies_keep_their_ids_under_any_class(tmp_path):
    """Rules drawn at random, under class names drawn at random."""
    rng = random.Random(3)
    normalizers = [
        None,
        {"type": "NFD"},
        {"type": "Lowercase"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ]
    for number in range(8):
        folder = checkpoint(tmp_path / str(number), model_type=rng.choice(["llama", "mistral", "qwen2", "qwen3"]))
        edit(folder / "tokenizer.json", lambda t: t.update(normalizer=rng.choice(normalizers)))
        name = rng.choice(["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
        edit(folder / "tokenizer_config.json", lambda c, name=name: c.update(tokenizer_class=name))
        written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = HuggingFaceTokenizer(str(folder))
        for text in PROBES:
            assert tokenizer.encode(text) == written.encode(text, add_special_tokens=False).ids, (name, text)
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == name
