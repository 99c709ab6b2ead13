"""The three tokenizers, and prompts and completions in token ids."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_ssft.data.prompt import encode_completion, encode_prompt
from megatron_ssft.errors import UserError
from megatron_ssft.records import SetExample, Trace
from megatron_ssft.tokenizers.data_text import PromptRules
from megatron_ssft.tokenizers.tokenizer import CharTokenizer, build_tokenizer

TEXT = "Janet’s ducks lay 16 eggs.\n\n  She sells 9 for $2: 🦆 <<9*2=18>>18\tdone \x00\x7f e\u0301"
CORPUS = [f"Question {i}: what is {i} plus {i + 1}? The answer is {2 * i + 1}, ducks and eggs." for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_hugging_face(folder, *, template=TEMPLATE, bos=False, eos="<|im_end|>", truncation=False, corpus=CORPUS):
    """A small byte-level BPE tokenizer of the ChatML kind as a Hugging Face folder."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
    )
    backend.train_from_iterator(corpus, trainer)
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    if truncation:
        backend.enable_truncation(max_length=4)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token="<s>", model_max_length=4)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


def save_sentencepiece(folder, **options):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "sp"),
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return str(folder / "sp.model")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_hugging_face(tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    return build_tokenizer("SentencePieceTokenizer", save_sentencepiece(tmp_path_factory.mktemp("sp")))


def example(prompt=None, *turns):
    messages = tuple({"role": role, "content": content} for role, content in turns) or None
    return SetExample("q", "f", 1, (), prompt=prompt, messages=messages)


@pytest.fixture(params=["char", "hugging_face", "sentence_piece"])
def tokenizer(request):
    return CharTokenizer() if request.param == "char" else request.getfixturevalue(request.param)


def test_every_text_comes_back_and_ids_stay_in_the_vocabulary(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
    assert tokenizer.encode("") == []


def test_decode_spells_the_end_of_turn_and_leaves_out_forking_tokens(tokenizer):
    end = tokenizer.decode([tokenizer.eos_id])
    assert end and tokenizer.token_to_id(end) == tokenizer.eos_id
    ids = [tokenizer.vocab_size, *tokenizer.encode("so"), tokenizer.eos_id, tokenizer.vocab_size + 3]
    assert tokenizer.decode(ids) == "so" + end
    assert tokenizer.token_to_id("<think1>") is None and tokenizer.token_to_id("never seen") is None


def test_char_tokenizer_is_the_bytes_of_utf8():
    tokenizer = CharTokenizer()
    assert tokenizer.encode("a<é") == [97, 60, 0xC3, 0xA9]
    assert tokenizer.token_to_id("a") == 97 and tokenizer.token_to_id("é") is None
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_special_tokens_in_a_text_are_recognised_by_hugging_face_only(hugging_face):
    assert hugging_face.encode("a<|im_end|>").count(hugging_face.eos_id) == 1
    assert CharTokenizer().encode("<|endoftext|>").count(256) == 0


def test_lengths_stored_in_the_folder_do_not_cut(tmp_path):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", save_hugging_face(tmp_path, truncation=True))
    assert tokenizer.decode(tokenizer.encode(TEXT * 20)) == TEXT * 20


def test_ids_with_holes_are_covered_by_the_vocabulary_size(tmp_path):
    folder = save_hugging_face(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 1000
    file.write_text(json.dumps(data))
    assert build_tokenizer("HuggingFaceTokenizer", folder).vocab_size == 1001


def test_chat_template_with_generation_prompt(hugging_face):
    ids = encode_prompt(example(None, ("user", "two eggs?")), hugging_face)
    assert hugging_face.decode(ids) == "<|im_start|>user\ntwo eggs?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(hugging_face.token_to_id("<|im_start|>")) == 2
    with pytest.raises(UserError, match="refuses the messages: no tools here"):
        encode_prompt(example(None, ("tool", "x"), ("user", "y")), hugging_face)
    assert encode_prompt(example("as is"), hugging_face) == hugging_face.encode("as is")


def test_plain_rendering_without_a_template():
    tokenizer = CharTokenizer()
    assert tokenizer.decode(encode_prompt(example(None, ("user", "hi")), tokenizer)) == "hi\n"
    several = example(None, ("system", "be brief"), ("user", "hi"))
    assert tokenizer.decode(encode_prompt(several, tokenizer)) == "system: be brief\nuser: hi\n"


def test_bos_begins_untemplated_prompts_once_where_the_convention_has_one(tmp_path, sentence_piece, hugging_face):
    assert sentence_piece.bos_id is not None
    for prompt in (example("hi"), example(None, ("user", "hi"))):
        assert encode_prompt(prompt, sentence_piece).index(sentence_piece.bos_id) == 0
    assert hugging_face.bos_id is None  # it has a bos token but does not add it
    adding = build_tokenizer("HuggingFaceTokenizer", save_hugging_face(tmp_path, bos=True, template=None))
    assert adding.bos_id == adding.token_to_id("<s>")
    assert encode_prompt(example("hi"), adding) == [adding.bos_id, *adding.encode("hi")]
    folder = save_hugging_face(tmp_path, bos=True, template=None)
    adding = build_tokenizer("HuggingFaceTokenizer", folder, PromptRules(control_tokens="control"))
    assert encode_prompt(example("<s>hi"), adding) == [adding.bos_id, *adding.encode("hi")]
    assert adding.render_chat([{"role": "user", "content": "hi"}]) is None


def test_completion_is_trace_answer_and_end_of_turn(tokenizer):
    plain = encode_completion(Trace("think"), tokenizer, "\n##")
    assert plain == [*tokenizer.encode("think"), tokenizer.eos_id]
    answered = encode_completion(Trace("think", answer="18"), tokenizer, "\n##")
    assert answered == [*tokenizer.encode("think\n##18"), tokenizer.eos_id]


def test_fingerprints_follow_tokenization_and_template_only(tmp_path, hugging_face, sentence_piece):
    def fingerprint(name, **options):
        (tmp_path / name).mkdir()
        return build_tokenizer("HuggingFaceTokenizer", save_hugging_face(tmp_path / name, **options)).fingerprint()

    assert fingerprint("same") == hugging_face.fingerprint()
    changed = [
        fingerprint("template", template=TEMPLATE + " "),
        fingerprint("none", template=None),
        fingerprint("bos", bos=True),
        fingerprint("eos", eos="<|endoftext|>"),
        fingerprint("merges", corpus=CORPUS[:5]),
        hugging_face.fingerprint(),
        CharTokenizer().fingerprint(),
        sentence_piece.fingerprint(),
    ]
    assert len(set(changed)) == len(changed)
    assert all(len(f) == 64 and int(f, 16) >= 0 for f in changed)


def test_unusable_files_are_refused_in_one_line(tmp_path):
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"junk" * 50)
    no_end = save_sentencepiece(tmp_path, eos_id=-1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_vocabulary").mkdir()
    (tmp_path / "no_vocabulary" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "no_end").mkdir()
    cases = [
        ("SentencePieceTokenizer", str(junk), "not a SentencePiece model"),
        ("SentencePieceTokenizer", str(tmp_path / "absent"), "No such file"),
        ("SentencePieceTokenizer", no_end, "no end-of-sentence piece"),
        ("HuggingFaceTokenizer", str(tmp_path / "absent"), "no such folder"),
        ("HuggingFaceTokenizer", str(tmp_path / "empty"), "no usable tokenizer"),
        ("HuggingFaceTokenizer", str(tmp_path / "broken"), "no usable tokenizer"),
        (
            "HuggingFaceTokenizer",
            str(tmp_path / "no_vocabulary"),
            "no usable tokenizer: the folder holds no vocabulary",
        ),
        ("HuggingFaceTokenizer", save_hugging_face(tmp_path / "no_end", eos=None), "no eos_token"),
    ]
    for kind, path, reason in cases:
        with pytest.raises(UserError) as caught:
            build_tokenizer(kind, path)
        message = str(caught.value)
        assert message.startswith(f"--tokenizer-model {path}: ") and reason in message and "\n" not in message


def test_importing_the_module_loads_no_tokenizer_library():
    libraries = "{'transformers', 'sentencepiece'}"
    code = f"import sys, megatron_ssft.tokenizers.tokenizer; sys.exit(bool({libraries} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
