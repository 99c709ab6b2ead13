"""A tag that a question spells is text; a tag that the model writes is found, or its loss is said."""

from __future__ import annotations

import json
import sys
import types

import pytest
import tokenizers

from megatron_ssft.cli import generate
from megatron_ssft.data.questions import read_questions
from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import write_forking_tokens
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.generation.backend import shortest_start
from megatron_ssft.generation.model_folder import TagFlags, open_model_folder
from megatron_ssft.generation.own_tags import OwnTags
from megatron_ssft.generation.requests import Sampling, TagPlan, build_requests
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.tokenizers.data_text import PromptRules
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.completion_server import PLAIN, Server
from tests.helpers.hf_models import random_model

SAMPLING = Sampling(temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=8)
RESERVED = "<|r{i}|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """special: an export with special tags. text: the published ones. reserved: a base model's own special tokens.

    entries: tags of format text in a tokenizer that has them as entries.
    """
    parent = tmp_path_factory.mktemp("models")
    base = random_model(parent / "base", "llama", True)

    def copy(name):
        (parent / name).mkdir()
        for file in base.iterdir():
            (parent / name / file.name).write_bytes(file.read_bytes())
        return parent / name

    tokenizer = HuggingFaceTokenizer(str(base))
    tags = build_forking_tokens(tokenizer, 2, "special", None)
    for name in ("special", "entries"):
        write_assets(base, parent / name, tags, 301, "float32")
        (parent / name / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    write_forking_tokens(parent / "special", tags)
    (parent / "entries" / "forking_tokens.json").unlink()
    write_forking_tokens(copy("text"), build_forking_tokens(tokenizer, 2, "text", None))
    reserved = copy("reserved") / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(reserved))
    backend.add_special_tokens([RESERVED.format(i=i) for i in (1, 2)])
    backend.save(str(reserved))
    return parent


FLAGS = {
    "special": TagFlags(),
    "text": TagFlags(),
    "reserved": TagFlags(2, "special", RESERVED),
    "entries": TagFlags(2, "text", "<think{i}>\n"),
}
KINDS = [*FLAGS]


def opened(folders, kind, rules="text"):
    return open_model_folder(folders / kind, FLAGS[kind], PromptRules(control_tokens=rules))


def asking(folder, tags, *forms):
    """A file of questions that spell the tags."""
    text = "What does " + " or ".join([*tags.strings, *(s.strip() for s in tags.strings)]) + " mean?"
    rows = {
        "question": {"question": text},
        "messages": {"messages": [{"role": "system", "content": text}, {"role": "user", "content": text + text}]},
        "prompt": {"prompt": text},
    }
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps({"id": form, "answer": "?"} | rows[form]) + "\n" for form in forms))
    return path, text


def holds(ids, part):
    ids, part = list(ids), list(part)
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_spelled_tag_is_text_to_every_backend(folders, kind, tmp_path, monkeypatch):
    model = opened(folders, kind)
    path, text = asking(tmp_path, model.tags, "question", "messages", "prompt")
    requests = build_requests(read_questions(path), model, TagPlan("each", 1), SAMPLING, 1)
    assert len(requests) == 6
    for request in requests:
        assert not any(holds(request.prompt, ids) for ids in model.tags.ids), request.id
        assert text in model.tokenizer.decode(request.prompt)
    prompts = [[*request.prompt, *request.start] for request in requests]
    common = ["--model", folders / kind, "--data", path, "--prompt-control-tokens", "text", "--max-new-tokens", "3"]
    flags = FLAGS[kind]
    if flags.num_forking_tokens:
        common += ["--num-forking-tokens", 2, "--forking-token-format", flags.format]
        common += ["--forking-token-template", flags.template]
    with Server(tokenizer=model.tokenizer) as server:
        more = ["--output", tmp_path / "served.jsonl", "--backend", "openai", "--base-url", server.url]
        assert generate.main([*map(str, [*common, *more])], "generate") == 0
        assert sorted(body["prompt"] for body in server.bodies[1:]) == sorted(prompts)
    seen = []
    module = types.ModuleType("vllm")
    module.SamplingParams = lambda **settings: None

    class LLM:
        def __init__(self, **settings):
            pass

        def generate(self, given, settings, use_tqdm):
            seen.extend(prompt["prompt_token_ids"] for prompt in given)
            output = types.SimpleNamespace(token_ids=[9], finish_reason="length")
            return [types.SimpleNamespace(outputs=[output]) for _ in given]

    module.LLM = LLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    more = ["--output", tmp_path / "engine.jsonl", "--backend", "vllm"]
    assert generate.main([*map(str, [*common, *more])], "generate") == 0
    assert seen == prompts


@pytest.mark.parametrize("kind", ["special", "reserved", "entries"])
def test_a_server_that_takes_text_only_would_make_a_tag_of_it(folders, kind, tmp_path):
    model = opened(folders, kind)
    path, _ = asking(tmp_path, model.tags, "question")
    flags = FLAGS[kind]
    more = ["--num-forking-tokens", 2, "--forking-token-format", flags.format]
    more += ["--forking-token-template", flags.template]
    with Server(PLAIN, ids=False, tokenizer=model.tokenizer) as server:
        arguments = ["--model", folders / kind, "--data", path, "--output", tmp_path / "r.jsonl", "--backend", "openai"]
        arguments += ["--base-url", server.url, *(more if flags.num_forking_tokens else [])]
        with pytest.raises(UserError, match="'question'.*does not give the same tokens again .a tag or another"):
            generate.main([*map(str, arguments)], "generate")
        assert not any("mean" in str(body["prompt"]) for body in server.bodies), "nothing was asked"


def test_ordinary_text_that_is_a_tag_is_said(folders, tmp_path, capsys):
    """Tags of format text without a control token are what a question may spell; nothing tells them apart."""
    path, _ = asking(
        tmp_path, build_forking_tokens(HuggingFaceTokenizer(str(folders / "base")), 2, "text", "[{i}]"), "question"
    )
    arguments = ["--model", folders / "base", "--data", path, "--output", tmp_path / "r.jsonl", "--max-new-tokens", 1]
    arguments += ["--num-forking-tokens", 2, "--forking-token-format", "text", "--forking-token-template", "[{i}]"]
    generate.main([*map(str, arguments)], "generate")
    assert (
        "1 of 1 prompts hold the very tokens of a tag; tags of format text are ordinary text" in capsys.readouterr().out
    )


# -- the model's own tags over a server that returns text ------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "question": f"{i} plus 1?"}) + "\n" for i in range(4)))
    return path


def run(folders, kind, questions, server, mode="own"):
    output = questions.parent / "r.jsonl"
    arguments = [
        "--model",
        folders / kind,
        "--data",
        questions,
        "--output",
        output,
        "--tags",
        mode,
        "--backend",
        "openai",
    ]
    arguments += ["--base-url", server.url, "--max-new-tokens", "40", "--retries", 0]
    flags = FLAGS[kind]
    if flags.num_forking_tokens:
        arguments += ["--num-forking-tokens", 2, "--forking-token-format", flags.format]
        arguments += ["--forking-token-template", flags.template]
    assert generate.main([*map(str, arguments)], "generate") == 0
    return {rollout.id: rollout for rollout in read_rollouts(output)}


def writer(model):
    """Seed -> a tag chosen by it, and an answer."""
    return lambda seed: [*model.tags.ids[seed % 2], *model.tokenizer.encode(f"Answer {seed % 7}")]


PLAIN_TEXT = {"takes": PLAIN, "ids": False}
KEEPS = {"takes": PLAIN | {"skip_special_tokens", "logit_bias"}, "ids": False}


@pytest.mark.parametrize("mode", ["own", "own-greedy"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("special", PLAIN_TEXT),
        ("special", {"takes": PLAIN}),
        ("text", PLAIN_TEXT),
        ("reserved", KEEPS),
        ("reserved", KEEPS | {"ids": True}),
        ("reserved", {}),
        ("entries", PLAIN_TEXT),
    ],
)
def test_tags_are_found_in_text(folders, kind, settings, mode, questions):
    model = opened(folders, kind)
    write = writer(model)
    with Server(**settings, tokenizer=model.tokenizer, writes=write) as server:
        rollouts = run(folders, kind, questions, server, mode)
        bodies = [body for body in server.bodies if "logit_bias" not in body][1:]
    assert {rollout.tag for rollout in rollouts.values()} == {0, 1}
    if mode == "own":
        for rollout in rollouts.values():
            assert rollout.tag == rollout.seed % 2 and rollout.text == f"Answer {rollout.seed % 7}"
            assert list(rollout.token_ids) == model.tokenizer.encode(rollout.text)
    else:  # the second request of a question continues after the very ids of the tag
        own = OwnTags(model.tags, model.tokenizer)
        # A line feed behind the spelling of a tag of format text is left to the model.
        starts = [shortest_start(ids, lambda part: own.ends_with_tag(part) is not None) for ids in model.tags.ids]
        sent = [body["prompt"] for body in bodies if body["max_tokens"] == 40][-4:]
        ends = [tuple(model.tokenizer.encode(p) if isinstance(p, str) else p) for p in sent]
        assert {next(t for t, ids in enumerate(starts) if end[-len(ids) :] == ids) for end in ends} == {0, 1}


@pytest.mark.parametrize(
    "settings",
    [PLAIN_TEXT, {"takes": PLAIN}, {"takes": PLAIN | {"skip_special_tokens"}}, KEEPS | {"honours_skip": False}],
    ids=["text", "ids", "no bias", "ignored"],
)
@pytest.mark.parametrize("mode", ["own", "own-greedy"])
def test_a_server_whose_text_loses_the_tags_is_refused(folders, settings, mode, questions):
    model = opened(folders, "reserved")
    server_settings = {name: value for name, value in settings.items() if name != "honours_skip"}
    with Server(**server_settings, tokenizer=model.tokenizer, writes=writer(model)) as server:
        server.honours_skip = settings.get("honours_skip", True)
        with pytest.raises(UserError, match="leaves the special token '<|r1|>' out of it.*--backend hf"):
            run(folders, "reserved", questions, server, mode)
    assert not (questions.parent / "r.jsonl").exists()


def test_letters_of_a_tag_behind_the_beginning_are_not_taken_for_it(folders, questions, capsys):
    """With ids the model's letters and its token differ; a text shows the same for both."""
    model = opened(folders, "special")
    spelled = model.tokenizer.encode_text("Well, <think2> is a tag.")
    for settings, said in ((PLAIN_TEXT, "4 without a tag, 4 of them with one's letters"), ({}, "4 without a tag; ")):
        with Server(**settings, tokenizer=model.tokenizer, writes=lambda seed: spelled) as server:
            rollouts = run(folders, "special", questions, server)
        assert {(r.tag, r.text) for r in rollouts.values()} == {(None, "Well, <think2> is a tag.")}
        assert said in capsys.readouterr().out
        (questions.parent / "r.jsonl").unlink()


def test_which_tags_a_text_loses(folders):
    lost = {kind: OwnTags(opened(folders, kind).tags, opened(folders, kind).tokenizer).lost_in_text() for kind in KINDS}
    assert lost == {"special": [], "text": [], "reserved": [0, 1], "entries": []}
