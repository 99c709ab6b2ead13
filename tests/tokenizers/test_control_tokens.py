"""Text of the data is text: no question, role or trace makes a control token of what it spells."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from megatron_ssft.data.prompt import encode_completion, encode_prompt
from megatron_ssft.errors import UserError
from megatron_ssft.generation.model_folder import TagFlags, open_model_folder
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.records import SetExample, Trace
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_folders import checkpoint, edit, sentencepiece_checkpoint, special_tags
from tests.helpers.hf_models import CHATML

SPELLED = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<think2>",
    "a<|im_end|>",
    " <|im_end|> b",
    "<|im_end|><think1>",
]


def question(*turns, tools=None):
    return SetExample("q", "f", 1, (), messages=tuple({"role": r, "content": c} for r, c in turns), tools=tools)


def plain_ids(folder, text):
    """What the characters are to the folder's vocabulary without any added token."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    return [token.id for word, _ in words for token in backend.model.tokenize(word)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def exported(base):
    """The same tokenizer with six tags of format special in it."""
    target = base.with_name("exported")
    write_assets(base, target, special_tags(base), 384, "float32")
    save_file({"weight": torch.zeros(1)}, target / "model.safetensors")  # generation opens no folder without weights
    return target


@pytest.fixture(params=["base", "exported"])
def folder(request):
    return request.getfixturevalue(request.param)


def tokenizer_of(folder):
    return build_tokenizer("HuggingFaceTokenizer", str(folder))


@pytest.mark.parametrize("text", SPELLED)
def test_a_trace_is_its_characters_and_ends_once(base, folder, text):
    tokenizer = tokenizer_of(folder)
    trace = f"so {text} 4\n"
    assert encode_completion(Trace(trace), tokenizer, "\n") == [*plain_ids(base, trace), tokenizer.eos_id]
    ids = encode_completion(Trace("x", answer=text), tokenizer, "\n")
    assert ids == [*plain_ids(base, "x\n" + text), tokenizer.eos_id]
    assert tokenizer.decode(ids[:-1]) == "x\n" + text


@pytest.mark.parametrize("text", SPELLED)
def test_a_question_cannot_close_its_turn(base, folder, text):
    tokenizer = tokenizer_of(folder)
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.eos_id
    ids = encode_prompt(question(("system", text), ("user", f"{text}1+1?")), tokenizer)
    expected = [
        *(start, *plain_ids(base, f"system\n{text}"), end),
        *(*plain_ids(base, "\n"), start, *plain_ids(base, f"user\n{text}1+1?"), end),
        *(*plain_ids(base, "\n"), start, *plain_ids(base, "assistant\n")),
    ]
    assert ids == expected


def test_a_role_cannot_be_a_turn_of_its_own(base, folder):
    tokenizer = tokenizer_of(folder)
    ids = encode_prompt(question(("user<|im_end|>", "x"), ("user", "y")), tokenizer)
    assert ids.count(tokenizer.eos_id) == 2


def test_training_and_the_exported_model_agree_on_every_text(base, exported):
    """What a run trains on, generation with the export asks with; through the folder as generation opens it."""
    rng = random.Random(5)
    ours, theirs = tokenizer_of(base), open_model_folder(exported, TagFlags()).tokenizer
    pieces = [*SPELLED, "What is 7", " plus 8? ", "\n\n", "e\u0301", "数学", "<think", "2>", "<|im_", "end|>"]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        if not text.strip():
            continue
        row = question(("user", text), ("assistant", text), ("user", text))
        assert encode_prompt(row, ours) == encode_prompt(row, theirs), text
        assert encode_completion(Trace(text), ours, "\n") == encode_completion(Trace(text), theirs, "\n"), text


def test_text_without_control_tokens_is_what_transformers_makes_of_it(exported):
    """Through apply_chat_template itself, ids that merge over the borders of a turn included."""
    from transformers import AutoTokenizer

    reference, tokenizer = AutoTokenizer.from_pretrained(exported), tokenizer_of(exported)
    for content in ("What is 7 plus 8?", "\n\n x", "Question 7: ", "<|im_end", "naïve 🦆\t", "<think>"):
        row = question(("system", "Be brief."), ("user", content))
        chat = list(row.messages)
        ids = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(row, tokenizer) == ids, content
        assert encode_completion(Trace(content), tokenizer, "")[:-1] == reference(content)["input_ids"]


def test_transformers_agrees_on_special_tokens_in_a_text_when_it_is_asked_to(exported):
    """The setting that the documentation names, with the export of the tokenizer."""
    from transformers import AutoTokenizer

    reference, tokenizer = AutoTokenizer.from_pretrained(exported), tokenizer_of(exported)
    for text in (text for text in SPELLED if "think" not in text):
        ids = reference(f"so {text} 4\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encode_completion(Trace(f"so {text} 4\n"), tokenizer, "")[:-1] == ids


def test_a_role_of_which_a_template_builds_a_token_is_refused(tmp_path):
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}{% endfor %}"
    folder = checkpoint(tmp_path / "in")
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    with pytest.raises(UserError, match="role 'endoftext' becomes the control token"):
        encode_prompt(question(("endoftext", "x"), ("user", "y")), tokenizer_of(folder))
    assert encode_prompt(question(("text", "x"), ("user", "y")), tokenizer_of(folder))


def test_entries_of_the_vocabulary_that_are_not_special_stay_what_they_are(tmp_path):
    """`</think>` is how the model spells its reasoning's end; in a question it does not end the model's reasoning."""
    folder = checkpoint(tmp_path / "in")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    entries = [{"id": 290 + i, "content": text, **flags} for i, text in enumerate(["<think>", "</think>", "<|User|>"])]
    edit(folder / "tokenizer.json", lambda t: t["added_tokens"].extend(entries))
    template = CHATML.replace("{% if add", "{# <|User|> </think> #}{% if add")
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    tokenizer = tokenizer_of(folder)
    assert encode_completion(Trace("<think>x</think>y"), tokenizer, "\n")[0] == 290
    assert 291 in encode_completion(Trace("x</think>y"), tokenizer, "\n")
    ids = encode_prompt(question(("user", "a<|User|></think>"), ("assistant", "</think>b"), ("user", "c")), tokenizer)
    assert (ids.count(292), ids.count(291)) == (0, 1)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_pieces_in_a_text(tmp_path, model_type):
    """Also where the model itself would make control pieces of the text, and where a text's first space is added."""
    import sentencepiece

    source = sentencepiece_checkpoint(tmp_path / "in", model_type, settings={"chat_template": CHATML})
    reference = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    tokenizer = tokenizer_of(source)
    for text in ("a</s>b", "</s>", "<s> x </s>", "<unk>"):
        ids = encode_completion(Trace(text), tokenizer, "\n")
        assert ids == [*reference.encode(text), tokenizer.eos_id], text
        assert tokenizer.eos_id not in encode_prompt(question(("user", text)), tokenizer)


def test_a_verbatim_prompt_says_what_its_control_tokens_are(tmp_path, base):
    prompt = SetExample("q", "f", 1, (), prompt="<|im_start|>user\n1+1?<|im_end|>\n")
    with pytest.raises(UserError, match=r"'prompt' spells the control token '<\|im_start\|>'.*--prompt-control-tokens"):
        encode_prompt(prompt, tokenizer_of(base))
    from megatron_ssft.tokenizers.data_text import PromptRules

    as_control = build_tokenizer("HuggingFaceTokenizer", str(base), PromptRules(control_tokens="control"))
    as_text = build_tokenizer("HuggingFaceTokenizer", str(base), PromptRules(control_tokens="text"))
    assert encode_prompt(prompt, as_control).count(1) == 1 == encode_prompt(prompt, as_control).count(2)
    assert encode_prompt(prompt, as_text) == plain_ids(base, prompt.prompt)
    assert len({t.fingerprint() for t in (as_control, as_text, tokenizer_of(base))}) == 3


def test_a_character_that_stands_for_nothing_is_refused(base):
    tokenizer = tokenizer_of(base)
    for code in range(0xFDD0, 0xFDD4):
        with pytest.raises(UserError, match=f"U\\+{code:04X}"):
            encode_completion(Trace(f"x{chr(code)}1"), tokenizer, "\n")
        with pytest.raises(UserError, match=f"U\\+{code:04X}"):
            encode_prompt(question(("user", f"<|im_end|>{chr(code)}")), tokenizer)


def test_counts_reach_the_start_of_a_run(tmp_path, base):
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.data.cache import SetDataset
    from megatron_ssft.objectives.sets import data_notes, prepare_data
    from megatron_ssft.tokenizers.vocabulary import build_vocabulary

    rows = [
        {"id": "a", "question": "<|im_end|>?", "traces": [{"text": "x<|im_end|><|im_end|>"}, {"text": "y"}]},
        {"id": "b", "prompt": "<|im_start|>z", "traces": [{"text": "z"}]},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8, "train_iters": 1}
    values |= {"data_path": [str(path)], "tokenizer_model": str(base), "data_cache_path": str(tmp_path / "cache")}
    config = build_config(values | {"prompt_control_tokens": "control"}, SSFTConfig)
    dataset = SetDataset.open(prepare_data(config, build_vocabulary(config.run))["train"])
    notes = data_notes(config, "training data", dataset)
    assert notes == [
        "training data: control tokens spelled in questions: 1, in traces: 2; text there",
        "training data: control tokens spelled in verbatim prompts: 1; taken as control",
    ]
    path.write_text(json.dumps(rows[0] | {"question": "1+1?", "traces": [{"text": "2"}]}) + "\n")
    clean = SetDataset.open(prepare_data(config, build_vocabulary(config.run))["train"])
    assert data_notes(config, "training data", clean) == []
