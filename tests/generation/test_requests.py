"""What is asked for: questions, tags, seeds, prompts as in training, and what becomes of the answers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from megatron_ssft.data.prompt import tokenize_set
from megatron_ssft.data.questions import question_mark, read_questions
from megatron_ssft.data.reading import read_examples
from megatron_ssft.errors import UserError
from megatron_ssft.generation.model_folder import ModelFolder, TagFlags, open_model_folder
from megatron_ssft.generation.own_tags import OwnTags
from megatron_ssft.generation.requests import (
    Generated,
    RolloutMaker,
    Sampling,
    TagPlan,
    build_requests,
    plan_tags,
    prompt_mark,
    sample_seed,
)
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer, HuggingFaceTokenizer
from tests.helpers.hf_models import chatml_tokenizer, qwen_tokenizer

SAMPLING = Sampling(temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=50)
ROWS = [
    {"id": "a", "question": "What is 2 plus 3?", "answer": 5, "choices": ["1", "2"], "tests": {"type": "stdin"}},
    {"id": 7, "prompt": "Verbatim, |im_start|>", "traces": []},
    {"id": "c", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Apples?"}]},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def char_model(num_tags=3, format="special", template=None, max_length=None):
    tokenizer = CharTokenizer()
    tags = build_forking_tokens(tokenizer, num_tags, format, template)
    return ModelFolder(None, tokenizer, tags, frozenset({256, 9}), max_length, "m", "t")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return HuggingFaceTokenizer(str(chatml_tokenizer(tmp_path_factory.mktemp("chatml"))))


# -- questions -------------------------------------------------------------------------------------------------------


def test_questions_need_no_traces_and_no_text_answer(tmp_path):
    questions = read_questions(write_rows(tmp_path / "q.jsonl", ROWS))
    assert [q.id for q in questions] == ["a", "7", "c"]
    assert [q.line for q in questions] == [1, 2, 3]
    assert questions[0].messages == ({"role": "user", "content": "What is 2 plus 3?"},)
    assert questions[1].prompt == "Verbatim, |im_start|>"
    assert [q.id for q in read_questions(tmp_path / "q.jsonl", limit=2)] == ["a", "7"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1]", "expected a JSON object"),
        ('{"question": "x"}', "'id' is missing"),
        ('{"id": "a"}', "exactly one of"),
        ('{"id": "a", "question": "x", "prompt": "y"}', "exactly one of"),
        ('{"id": "a", "question": " "}', "'question' is blank"),
        ('{"id": "ok", "question": "again"}', "already used on line 1"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_rows_are_named_by_line(tmp_path, row, reason):
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "ok", "question": "x"}\n\n' + row + "\n")
    with pytest.raises(UserError, match=reason) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_an_empty_or_missing_file_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    for name in ("q.jsonl", "nothing.jsonl"):
        with pytest.raises(UserError, match=name):
            read_questions(tmp_path / name)


# -- prompts and tags ------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_training(tmp_path, chatml):
    """Read by the reader of training, tokenized by its tokenization, the same rows give the same prompts."""
    from megatron_ssft.config import DataConfig

    rows = [{**row, "answer": "5", "traces": [{"text": "t"}]} for row in ROWS]
    examples, _ = read_examples(
        [write_rows(tmp_path / "train.jsonl", rows)], num_tags=None, max_traces=None, trace_filter=None, seed=0
    )
    tags = build_forking_tokens(chatml, 2, "special", None)
    sets = [tokenize_set(each, chatml, 1, DataConfig(data_path=["x"]), 512, Counter(), []) for each in examples]
    model = ModelFolder(None, chatml, tags, frozenset({chatml.eos_id}), None, "m", "t")
    questions = read_questions(write_rows(tmp_path / "q.jsonl", ROWS))
    requests = build_requests(questions, model, TagPlan("each", 1), SAMPLING, 0)
    assert [list(r.prompt) for r in requests[::2]] == [list(s.prompt_ids) for s in sets]
    assert [r.start for r in requests[:2]] == [tags.ids[0], tags.ids[1]]


def slots(plan, num_tags=3):
    return list(plan.slots(num_tags))


def test_slots_of_every_mode():
    assert slots(TagPlan("each", 2)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert slots(TagPlan("fixed", 2, tag=1)) == [(1, 0), (1, 1)]
    assert slots(TagPlan("round-robin", 5)) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    for mode in ("own", "own-greedy", "none"):
        assert slots(TagPlan(mode, 2)) == [(None, 0), (None, 1)]


def requests_of(model, tmp_path, plan, rows=ROWS, seed=1):
    return build_requests(read_questions(write_rows(tmp_path / "q.jsonl", rows)), model, plan, SAMPLING, seed)


def test_seeds_depend_on_the_sample_alone(tmp_path):
    model = char_model()
    known = {r.key: r.seed for r in requests_of(model, tmp_path, TagPlan("each", 4))}
    assert len(set(known.values())) == len(known)
    assert all(0 <= seed < 2**31 for seed in known.values())
    backwards = requests_of(model, tmp_path, TagPlan("each", 2), ROWS[::-1])
    round_robin = requests_of(model, tmp_path, TagPlan("round-robin", 9), ROWS[1:])
    assert all(known[r.key] == r.seed for r in [*backwards, *round_robin])
    assert all(known[r.key] != r.seed for r in requests_of(model, tmp_path, TagPlan("each", 4), seed=2))


def test_seeds_are_the_same_in_every_version():
    """Files are gone on with by later versions."""
    assert [sample_seed(1, "q", tag, 3) for tag in (0, None)] == [1834692381, 630197710]


def test_prompts_are_told_apart_but_for_the_tag(tmp_path):
    model = char_model()
    known = {r.key: prompt_mark(r) for r in requests_of(model, tmp_path, TagPlan("each", 2))}
    assert len(set(known.values())) == len(ROWS)
    reworded = [ROWS[0] | {"question": "What is 2 plus 4?"}, ROWS[1] | {"answer": "9"}]
    for request in requests_of(model, tmp_path, TagPlan("each", 1), reworded, seed=2):
        assert (prompt_mark(request) == known[request.key]) == (request.id == "7")


def test_a_prompt_without_room_is_named_by_line(tmp_path):
    room = len("What is 2 plus 3?\n") + 1 + 4  # the first prompt, its tag, four tokens
    requests = requests_of(char_model(max_length=room), tmp_path, TagPlan("each", 1), ROWS[:1])
    assert {r.limit for r in requests} == {4}
    with pytest.raises(UserError, match=r"q.jsonl:2: the prompt is 22 tokens with its tag, the model takes 22"):
        requests_of(char_model(max_length=22), tmp_path, TagPlan("each", 1), ROWS[:2])


TAGS = char_model().tags


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mode": "each", "tags": None}, "--tags none"),
        ({"mode": "own", "tags": None}, "forking_tokens.json"),
        ({"mode": "fixed"}, "--tag go together"),
        ({"mode": "each", "tag": "1"}, "--tag go together"),
        ({"mode": "own", "samples_per_tag": 2}, "give --samples"),
        ({"mode": "each", "samples": 2}, "give --samples-per-tag"),
        ({"mode": "fixed", "tag": "0", "samples": 2, "samples_per_tag": 2}, "one of the two"),
        ({"mode": "each", "samples_per_tag": 0}, "at least 1"),
        ({"mode": "own", "samples": -1}, "at least 1"),
        ({"mode": "fixed", "tag": "3"}, "0 to 2, or <think1> to <think3>"),
        ({"mode": "fixed", "tag": "<think"}, "no such tag"),
    ],
)
def test_flags_that_contradict_each_other(arguments, reason):
    given = {"tags": TAGS, "tag": None, "samples": None, "samples_per_tag": None, **arguments}
    with pytest.raises(UserError, match=reason):
        plan_tags(given.pop("mode"), given.pop("tags"), **given)


def test_a_fixed_tag_is_a_number_or_a_text():
    text = ForkingTokens(
        tuple(f"<|im_start|><think{i}>\n" for i in range(1, 13)), tuple((i, 0) for i in range(12)), "text"
    )
    for tags, written, number in [
        (TAGS, "2", 2),
        (TAGS, "<think3>", 2),
        (text, "<think1>", 0),
        (text, "<think12>", 11),
        (text, "<|im_start|><think2>", 1),
        (text, "11", 11),
    ]:
        assert plan_tags("fixed", tags, tag=written, samples_per_tag=None, samples=4) == TagPlan("fixed", 4, number)
    assert plan_tags("none", None, tag=None, samples_per_tag=None, samples=None) == TagPlan("none", 1)


@pytest.mark.parametrize(
    "change", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_sampling_out_of_range_is_refused(change):
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} "):
        dataclasses.replace(SAMPLING, **change)


# -- tags the model wrote --------------------------------------------------------------------------------------------


def test_special_tags_are_found_by_id():
    own = OwnTags(TAGS, CharTokenizer())
    tag = [ids[0] for ids in TAGS.ids]
    assert own.find([tag[2], 65]) == (2, 1)
    assert own.find([10, tag[0], tag[1]]) == (0, 2)
    assert own.find([65] * 100 + [tag[0]]) == (None, 0)
    assert own.find(list(b"<think1>")) == (None, 0)
    assert own.find([]) == (None, 0)
    assert own.ends_with_tag([65, tag[1]]) == 1
    assert own.ends_with_tag([65]) is None
    assert own.split_text("<think2>ab<think1>") == (1, "ab<think1>")
    assert own.split_text("ab") == (None, "ab")


def test_text_tags_are_found_however_they_are_spelled():
    tokenizer = CharTokenizer()
    tags = build_forking_tokens(tokenizer, 12, "text", "<|im_start|>think{i}\n")
    own = OwnTags(tags, tokenizer)
    for text, tag, rest in [
        ("<|im_start|>think12\nabc", 11, "abc"),
        ("think2\nabc", 1, "abc"),
        ("abc", None, "abc"),
        ("think13", 0, "3"),  # there is no tag 13
    ]:
        assert own.split_text(text) == (tag, rest)
    assert own.split_text("x" * 300 + "think2")[0] is None
    ids = tokenizer.encode("<|im_start|>think3\nabc")
    assert own.find(ids) == (2, ids.index(ord("3")) + 1)
    assert own.find(tokenizer.encode("x" * 300 + "think3\n")) == (None, 0)


def test_the_published_tag_is_found_at_its_last_token(tmp_path):
    folder = qwen_tokenizer(tmp_path)
    if folder is None:
        pytest.skip("the package dashscope is not installed")
    tokenizer = HuggingFaceTokenizer(str(folder))
    own = OwnTags(build_forking_tokens(tokenizer, 6, "text", None), tokenizer)
    ids = [151644, 13708, 766, 17, 397]
    assert own.find([*ids, 9707]) == (1, 5)
    assert own.find(ids[1:]) == (1, 4)  # a server that drops the turn marker
    assert [own.ends_with_tag(ids[:n]) for n in range(1, 6)] == [None, None, None, None, 1]


# -- what becomes of the answers -------------------------------------------------------------------------------------


def rollout_of(tmp_path, mode, ids, reason="stop", text="", model=None, **changes):
    model = model or char_model()
    plan = TagPlan(mode, 1, 1 if mode == "fixed" else None)
    request = dataclasses.replace(requests_of(model, tmp_path, plan)[0], **changes)
    return RolloutMaker(model, plan, {"mode": mode}).rollout(Generated(request, ids, reason, text))


def test_text_leaves_out_prompt_tag_and_stop_token(tmp_path):
    a, b, eos, other = 97, 98, 256, 9
    tag = TAGS.ids[2][0]
    done = rollout_of(tmp_path, "fixed", (a, b, eos))
    assert (done.tag, done.text, done.token_ids, done.finish_reason) == (1, "ab", (a, b, eos), "stop")
    done = rollout_of(tmp_path, "fixed", (a, b, other))  # any of the model's stop tokens
    assert (done.text, done.token_ids) == ("ab", (a, b, other))
    done = rollout_of(tmp_path, "fixed", (a, b), "length")
    assert (done.text, done.token_ids) == ("ab", (a, b))
    done = rollout_of(tmp_path, "fixed", (a,))  # a server that keeps the stop token to itself
    assert (done.text, done.token_ids) == ("a", (a, eos))
    done = rollout_of(tmp_path, "own", (tag, a, eos))
    assert (done.tag, done.text, done.token_ids, done.key) == (2, "a", (a, eos), ("a", None, 0))
    done = rollout_of(tmp_path, "own", (eos,))
    assert (done.tag, done.text, done.token_ids) == (None, "", (eos,))
    done = rollout_of(tmp_path, "own-greedy", (a, tag, eos), chosen=1)  # a later tag is part of the text
    assert (done.tag, done.token_ids, done.key) == (1, (a, tag, eos), ("a", None, 0))
    (asked,) = {question_mark(example) for example in read_questions(tmp_path / "q.jsonl") if example.id == done.id}
    assert done.question == asked
    assert done.prompt == prompt_mark(requests_of(char_model(), tmp_path, TagPlan("each", 1))[0])
    done = rollout_of(tmp_path, "none", (a, eos))
    assert (done.tag, done.text) == (None, "a")


def test_text_without_ids_is_tokenized_again(tmp_path):
    done = rollout_of(tmp_path, "fixed", None, text="ab")
    assert (done.text, done.token_ids) == ("ab", (97, 98, 256))
    done = rollout_of(tmp_path, "own", None, "length", text="<think3>ab")
    assert (done.tag, done.text, done.token_ids) == (2, "ab", (97, 98))


# -- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.helpers.hf_models import random_model

    return random_model(tmp_path_factory.mktemp("folder"), "llama", True)


def test_the_folder_says_where_to_stop_and_how_long_it_is(folder):
    model = open_model_folder(folder, TagFlags())
    assert (model.stop_ids, model.max_length, model.tags) == ({0, 2}, 512, None)
    tags = open_model_folder(folder, TagFlags(3)).tags
    assert (tags.ids, tags.strings[0]) == (((290,), (291,), (292,)), "<think1>")
    assert open_model_folder(folder, TagFlags(2, "text", "[{i}]")).tags.format == "text"


def test_flags_that_do_not_fit_the_folder(folder, tmp_path):
    import shutil

    from megatron_ssft.formats.forking_tokens import write_forking_tokens

    with pytest.raises(UserError, match="<think12> need 302 vocabulary rows, the model has 301"):
        open_model_folder(folder, TagFlags(12))
    with pytest.raises(UserError, match="need --num-forking-tokens"):
        open_model_folder(folder, TagFlags(None, "text"))
    shutil.copytree(folder, tmp_path / "tagged")
    tokenizer = HuggingFaceTokenizer(str(folder))
    tags = build_forking_tokens(tokenizer, 3, "text", "[{i}]")
    write_forking_tokens(tmp_path / "tagged", tags)
    assert open_model_folder(tmp_path / "tagged", TagFlags()).tags == tags
    assert open_model_folder(tmp_path / "tagged", TagFlags(3, "text", "[{i}]")).tags == tags
    with pytest.raises(UserError, match="leave the flag out"):
        open_model_folder(tmp_path / "tagged", TagFlags(2, "text", "[{i}]"))
