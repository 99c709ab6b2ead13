"""Configuration, tokenizer and template of a Hugging Face folder: copied whole, exported with the tags added."""

from __future__ import annotations

import json
import random

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS
from megatron_ssft.hf.assets import copy_assets, find_tokenizer, write_assets
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_models import CHATML, chatml_tokenizer, qwen_tokenizer

TEXTS = [
    "Question 7: what is 7 plus 8?\n\n  The answer is 15 apples.  ",
    "  a b   c \n\t<think9> naïve ﬁ 数学 🦆 e\u0301",
    "<|im_start|>user\nx<|im_end|>",
    "",
]
CORPUS = [f"Question {i}: what is {i} plus {i + 1}?  The answer is {2 * i + 1} apples." for i in range(60)]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "num_attention_heads": 4,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "vocab_size": 290,
}
GENERATION = '{"eos_token_id": [2, 0],\n "do_sample": false}'


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def but_forking_tokens(folder):
    """The files of an export, of which one says what the tags are."""
    found = files(folder)
    del found[FORKING_TOKENS]
    return found


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def checkpoint(folder, **config):
    chatml_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "generation_config.json").write_text(GENERATION)
    return folder


def sentencepiece_checkpoint(folder, model_type="bpe", shuffle=False, model="llama", settings=None, symbols=()):
    """tokenizer.model as the only tokenizer file. `shuffle`: ids in another order than the scores."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type=model_type,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **({"user_defined_symbols": symbols} if symbols else {}),
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    if shuffle:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString((folder / "tokenizer.model").read_bytes())
        normal = [i for i, p in enumerate(proto.pieces) if p.type == 1]
        shuffled = random.Random(0).sample(normal, len(normal))
        pieces = [(proto.pieces[i].piece, proto.pieces[i].score) for i in shuffled]
        for i, (piece, score) in zip(normal, pieces):
            proto.pieces[i].piece, proto.pieces[i].score = piece, score
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": model}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def special_tags(folder, number=6):
    """Tags as a training run on `folder` makes them."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
    return build_forking_tokens(tokenizer, number, "special", None)


def assert_export_is_right(source, target, tags):
    """The promise of an export, through transformers: ordinary text as before, each tag one id that is not lost."""
    from transformers import AutoTokenizer

    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
        assert after.decode(before(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    assert after.chat_template == before.chat_template
    assert (after.eos_token_id, after.bos_token_id) == (before.eos_token_id, before.bos_token_id)
    for tag, (token_id,) in zip(tags.strings, tags.ids):
        assert after(tag, add_special_tokens=False)["input_ids"] == [token_id]
        within = after(f"x{tag}{tag}y", add_special_tokens=False)["input_ids"]
        assert within.count(token_id) == 2
        spaced = after(f"x \n{tag}\n  y", add_special_tokens=False)["input_ids"]
        assert after.decode(spaced).replace(f"{tag} ", tag) == f"x \n{tag}\n  y"  # SentencePiece adds one space
        assert after.decode([token_id], skip_special_tokens=True) == tag
        assert after.decode([token_id, after.eos_token_id], skip_special_tokens=True) == tag
        assert after.convert_tokens_to_ids(tag) == token_id and after.convert_ids_to_tokens(token_id) == tag
    assert special_tags(target, tags.num_tags) == tags  # an export can be trained further


def test_copy_takes_everything_but_weights_and_code(tmp_path):
    source = checkpoint(tmp_path / "in")
    (source / "additional_chat_templates").mkdir()
    kept = {
        "chat_template.jinja": "x",
        "special_tokens_map.json": "{}",
        "LICENSE": "l",
        "additional_chat_templates/rag.jinja": "y",
    }
    dropped = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling.py", "tekken.json"]
    dropped += ["chat_template.py", "LICENSE.safetensors"]
    for name, text in {**kept, **dict.fromkeys(dropped, "no")}.items():
        (source / name).write_text(text)
    blob = tmp_path / "blob"
    (source / "tokenizer.json").rename(blob)
    blob.chmod(0o444)
    (source / "tokenizer.json").symlink_to(blob)  # as in a download cache
    copy_assets(source, tmp_path / "run" / "hf")
    copied = files(tmp_path / "run" / "hf")
    expected = {*kept, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(copied) == expected
    assert all(copied[name] == files(source)[name] for name in expected)
    assert not (tmp_path / "run" / "hf" / "tokenizer.json").is_symlink()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["hf"]


def test_copy_replaces_an_older_copy_and_leaves_it_alone_when_it_fails(tmp_path):
    source = checkpoint(tmp_path / "in")
    copy_assets(source, tmp_path / "hf")
    (tmp_path / "hf" / "stale.json").write_text("{}")
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        copy_assets(source, tmp_path / "hf")
    assert (tmp_path / "hf" / "stale.json").exists()
    (source / "config.json").write_text(json.dumps(CONFIG))
    copy_assets(source, tmp_path / "hf")
    assert files(tmp_path / "hf") == files(source)
    copy_assets(tmp_path / "hf", tmp_path / "hf")  # a resumed run
    assert files(tmp_path / "hf") == files(source)
    with pytest.raises(UserError, match=r"nowhere/config\.json: cannot read it"):
        copy_assets(tmp_path / "nowhere", tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "in"]


def test_export_changes_two_keys_of_the_configuration_and_nothing_else(tmp_path):
    source = checkpoint(tmp_path / "in")
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("weights")
    write_assets(source, target, special_tags(source), 384, "bfloat16")
    assert json.loads((target / "config.json").read_text()) == {**CONFIG, "vocab_size": 384, "torch_dtype": "bfloat16"}
    assert (target / "generation_config.json").read_text() == GENERATION
    assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert (target / "model.safetensors").read_text() == "weights"
    assert set(files(target)) == {*files(source), "model.safetensors", FORKING_TOKENS}


def test_the_dtype_goes_where_the_configuration_has_it(tmp_path):
    for number, keys in enumerate((["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], [])):
        source = checkpoint(tmp_path / f"in{number}", **dict.fromkeys(keys, "float16"))
        wanted = set(keys or ["torch_dtype"])
        edit(source / "config.json", lambda c, keys=keys: [c.pop(k, None) for k in {"torch_dtype"} - set(keys)])
        write_assets(source, tmp_path / f"out{number}", None, 290, "bfloat16")
        config = json.loads((tmp_path / f"out{number}" / "config.json").read_text())
        assert {k for k in config if k.endswith("dtype")} == wanted and {config[k] for k in wanted} == {"bfloat16"}


def test_an_export_without_changes_is_the_same_bytes(tmp_path):
    source = checkpoint(tmp_path / "in")
    text = build_forking_tokens(build_tokenizer("HuggingFaceTokenizer", str(source)), 6, "text", None)
    write_assets(source, tmp_path / "text", text, 290, "float32")
    write_assets(source, tmp_path / "none", None, 290, "float32")
    assert files(tmp_path / "none") == files(source) == but_forking_tokens(tmp_path / "text")
    write_assets(source, tmp_path / "once", special_tags(source), 384, "float32")
    write_assets(tmp_path / "once", tmp_path / "twice", special_tags(source), 384, "float32")
    assert files(tmp_path / "twice") == files(tmp_path / "once") != files(source)
    write_assets(tmp_path / "once", tmp_path / "thrice", None, 384, "float32")  # nothing is known of tags: they stay
    assert files(tmp_path / "thrice") == files(tmp_path / "once")


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


def test_an_export_onto_its_source_is_refused(tmp_path):
    source = checkpoint(tmp_path / "in")
    before = files(source)
    with pytest.raises(UserError, match="must not replace"):
        write_assets(source, source, None, 384, "bfloat16")
    assert files(source) == before


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


def test_find_tokenizer(tmp_path):
    source = checkpoint(tmp_path / "in")
    assert find_tokenizer(source) == ("HuggingFaceTokenizer", source)
    alone = sentencepiece_checkpoint(tmp_path / "sp")
    assert find_tokenizer(alone) == ("HuggingFaceTokenizer", alone)
    (alone / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="neither"):
        find_tokenizer(alone)


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
