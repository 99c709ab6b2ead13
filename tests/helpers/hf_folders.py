"""Hugging Face folders without weights, and what an export of one must keep."""

from __future__ import annotations

import json
import random

from megatron_ssft.formats.forking_tokens import FORKING_TOKENS
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_models import chatml_tokenizer

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
    chatml_tokenizer(folder, qwen_rules=config.get("model_type") == "qwen2")
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
