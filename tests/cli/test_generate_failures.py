"""Samples that a server or an engine never gives: noted, tried again, and seen to be missing by score and evaluate."""

from __future__ import annotations

import json
import sys
import types

import pytest

from megatron_ssft.cli import evaluate, generate, score
from megatron_ssft.errors import UserError
from megatron_ssft.formats.failed_samples import read_failed
from megatron_ssft.formats.forking_tokens import write_forking_tokens
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.generation.requests import sample_seed
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.completion_server import Server, ends_by, status
from tests.helpers.hf_models import random_model

SEED = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An export with two tags of format special."""
    parent = tmp_path_factory.mktemp("models")
    base = random_model(parent / "base", "llama", True)
    tags = build_forking_tokens(HuggingFaceTokenizer(str(base)), 2, "special", None)
    write_assets(base, parent / "tagged", tags, 301, "float32")
    (parent / "tagged" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    write_forking_tokens(parent / "tagged", tags)
    return parent / "tagged"


class Place:
    """Questions, and the command over a server; every question is answered with the letters it ends with."""

    def __init__(self, model, folder):
        self.model, self.folder, self.output = model, folder, folder / "r.jsonl"
        self.data = folder / "q.jsonl"
        rows = [{"id": f"q{i}", "question": f"What is {i} plus 1?", "answer": "no"} for i in range(3)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tokenizer = HuggingFaceTokenizer(str(model))

    def server(self, poison=None, **settings):
        """`poison`: (question, slot, sample) -> its trouble."""
        seeds = {sample_seed(SEED, *key): trouble for key, trouble in (poison or {}).items()}
        return Server(poison=seeds, tokenizer=self.tokenizer, **settings)

    def generate(self, server, *more):
        """Exit status of the command."""
        flags = ["--model", self.model, "--data", self.data, "--output", self.output, "--seed", SEED]
        flags += ["--backend", "openai", "--base-url", server.url, "--retries", "0", "--concurrency", "1", *more]
        return generate.main([*map(str, flags)], "generate")

    def keys(self):
        return {rollout.key for rollout in read_rollouts(self.output)}


@pytest.fixture
def place(model, tmp_path):
    return Place(model, tmp_path)


ALL = {(f"q{q}", tag, sample) for q in range(3) for tag in range(2) for sample in range(2)}
EACH = ("--tags", "each", "--samples-per-tag", "2")


def test_what_failed_is_noted_and_alone_tried_again(place, capsys):
    bad = {("q0", 1, 0): ends_by("abort"), ("q1", 0, 1): ends_by(None), ("q2", 1, 1): status(500, "out: of luck")}
    with place.server(bad) as server:
        assert place.generate(server, *EACH) == 3
    assert place.keys() == ALL - {*bad}
    assert {row.key for row in read_failed(place.output)} == {*bad}
    out = capsys.readouterr().out
    assert (
        "9 samples, " in out and '3 samples failed: finish_reason "abort" 1, finish_reason null 1, status 500 1' in out
    )
    assert "noted in" in out and "r.failed.jsonl; start again to try them alone" in out
    with place.server({("q1", 0, 1): ends_by("repetition")}) as server:
        assert place.generate(server, *EACH) == 3
        seeds = [body["seed"] for body in server.bodies]
    assert {*seeds[1:]} == {sample_seed(SEED, *key) for key in bad}
    assert [(row.key, row.kind) for row in read_failed(place.output)] == [(("q1", 0, 1), 'finish_reason "repetition"')]
    with place.server() as server:
        assert place.generate(server, *EACH) == 0
        assert len(server.bodies) == 2
    assert place.keys() == ALL and not (place.folder / "r.failed.jsonl").exists()


def test_a_server_that_goes_away_ends_the_run_and_nothing_is_lost(place):
    trouble = [None] * 6 + [status(503)] * 99
    with (
        place.server({("q0", 0, 1): ends_by("abort")}, trouble=trouble) as server,
        pytest.raises(UserError, match="status 503"),
    ):
        place.generate(server, *EACH)
    assert place.keys() == {("q0", 0, 0), ("q0", 1, 0), ("q0", 1, 1), ("q1", 0, 0)}
    assert [row.key for row in read_failed(place.output)] == [("q0", 0, 1)]
    with place.server() as server:
        assert place.generate(server, *EACH) == 0
    assert place.keys() == ALL and read_failed(place.output) == []


def test_a_note_whose_samples_are_there_goes(place):
    with place.server({("q0", 0, 0): ends_by("abort")}) as server:
        assert place.generate(server, *EACH) == 3
    note = (place.folder / "r.failed.jsonl").read_text()
    with place.server() as server:
        assert place.generate(server, *EACH) == 0
        (place.folder / "r.failed.jsonl").write_text(note)
        assert place.generate(server, *EACH) == 0
    assert not (place.folder / "r.failed.jsonl").exists()


def test_a_note_outlives_a_call_that_asks_for_less(place):
    with place.server({("q2", 1, 1): ends_by("abort")}) as server:
        assert place.generate(server, *EACH) == 3
        assert place.generate(server, *EACH, "--limit", "1") == 0
    assert [row.key for row in read_failed(place.output)] == [("q2", 1, 1)]
    more = ("--tags", "each", "--samples-per-tag", "3", "--limit", "2")
    with place.server() as server:
        assert place.generate(server, *more) == 0
    assert [row.key for row in read_failed(place.output)] == [("q2", 1, 1)]


def test_no_sample_at_all_is_a_file_without_lines(place):
    with place.server({key: ends_by("content_filter") for key in ALL}) as server:
        assert place.generate(server, *EACH) == 3
    assert place.output.read_text() == "" and len(read_failed(place.output)) == 12


def test_without_the_greedy_start_a_questions_samples_fail_too(place):
    """Sampled from the prompt alone they would be samples of another mode."""
    with place.server({("q1", None, 0): ends_by("abort")}) as server:
        assert place.generate(server, "--tags", "own-greedy", "--samples", "2") == 3
    assert place.keys() == {(f"q{q}", None, sample) for q in (0, 2) for sample in range(2)}
    assert {row.key for row in read_failed(place.output)} == {("q1", None, 0), ("q1", None, 1)}


def test_scores_rewards_and_figures_say_what_is_missing(place, capsys):
    bad = {("q0", 1, 0): ends_by("abort"), ("q1", 0, 0): ends_by("abort"), ("q1", 0, 1): ends_by("abort")}
    with place.server(bad) as server:
        assert place.generate(server, *EACH) == 3
    capsys.readouterr()
    scores, rewards = place.folder / "s.jsonl", place.folder / "rewards.jsonl"
    arguments = [place.output, "--data", place.data, "--verifier", "exact", "--output", scores, "--rewards", rewards]

    def run():
        score.main([*map(str, arguments), "--workers", "1"], "score")
        evaluate.main([str(scores), "--output", str(place.folder / "evaluation")], "evaluate")
        return capsys.readouterr().out

    out = run()
    assert f'{place.output}: 3 samples are missing, they could not be generated (finish_reason "abort" 3)' in out
    assert "rewards.jsonl: 1 questions left out" in out
    line = f'{scores}: 3 samples are missing, they could not be generated (finish_reason "abort" 3)'
    assert line in out and line in (place.folder / "evaluation" / "tables.md").read_text()
    rows = {row["id"]: row["n"] for row in map(json.loads, rewards.read_text().splitlines())}
    assert rows == {"q0": [2, 1], "q2": [2, 2]}
    with place.server() as server:
        assert place.generate(server, *EACH) == 0
    assert "missing" not in run()
    assert len(rewards.read_text().splitlines()) == 3


def test_what_the_engine_gives_up_is_noted(place, monkeypatch):
    """vLLM in this process: any finish_reason but stop and length is no sample."""
    given_up = {
        sample_seed(SEED, "q0", 0, 0): ["abort", "stop"],
        sample_seed(SEED, "q1", 1, 0): ["error", None, "repetition"],
        sample_seed(SEED, "q2", 0, 1): [(), ()],
    }
    module = types.ModuleType("vllm")

    class SamplingParams:
        def __init__(self, **settings):
            self.seed = settings["seed"]

    class LLM:
        def __init__(self, **settings):
            pass

        def generate(self, prompts, sampling_params, use_tqdm):
            return [self.answer(settings.seed) for settings in sampling_params]

        def answer(self, seed):
            reason = given_up[seed].pop(0) if given_up.get(seed) else "length"
            outputs = [] if reason == () else [types.SimpleNamespace(token_ids=[9], finish_reason=reason)]
            return types.SimpleNamespace(outputs=outputs)

    module.SamplingParams, module.LLM = SamplingParams, LLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    flags = ["--model", place.model, "--data", place.data, "--output", place.output, "--seed", SEED, *EACH]
    assert generate.main([*map(str, flags), "--backend", "vllm"], "generate") == 3
    assert place.keys() == ALL - {("q1", 1, 0), ("q2", 0, 1)}
    assert {(row.key, row.reason) for row in read_failed(place.output)} == {
        (("q1", 1, 0), "finish_reason null"),
        (("q2", 0, 1), "no output"),
    }
