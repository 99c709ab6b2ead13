"""Generation by a real vLLM, in its own process and as a server, against the hf backend."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.failed_samples import read_failed
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.generation import openai_backend
from megatron_ssft.generation.model_folder import TagFlags, open_model_folder
from megatron_ssft.generation.openai_protocol import Dialect
from tests.helpers.paths import ROOT

EACH = ("--tags", "each", "--samples-per-tag", "3")
GREEDY = ("--greedy", "--max-new-tokens", "24")
WARM = ("--temperature", "0.8", "--top-p", "0.95", "--max-new-tokens", "16", "--seed", "5")


def command(model, questions, output, *more):
    words = [sys.executable, "-m", "megatron_ssft.cli", "generate", "--model", model, "--data", questions]
    return [*map(str, [*words, "--output", output, *more])]


def run(model, questions, output, *more):
    """Rollouts by their keys, and what was printed."""
    done = subprocess.run(command(model, questions, output, *more), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return {rollout.key: rollout for rollout in read_rollouts(output)}, done.stdout


def by_server(server):
    return ("--backend", "openai", "--base-url", server.url, "--concurrency", "4", "--retries", "1")


HF = ("--backend", "hf", "--device", "cpu", "--dtype", "float32")
ENGINE = ("--backend", "vllm", "--dtype", "float32")


def ids(rollouts):
    return {key: (rollout.tag, rollout.token_ids, rollout.finish_reason) for key, rollout in rollouts.items()}


@pytest.fixture(scope="module")
def greedy(model, questions, tmp_path_factory):
    """What the hf backend says."""
    folder = tmp_path_factory.mktemp("hf")
    each = run(model, questions, folder / "each.jsonl", *EACH, *GREEDY, *HF)[0]
    own = run(model, questions, folder / "own.jsonl", "--tags", "own", *GREEDY, *HF)[0]
    return ids(each), ids(own)


def test_the_server_gives_the_ids_of_the_hf_backend(model, questions, server, greedy, tmp_path):
    served, out = run(model, questions, tmp_path / "r.jsonl", *EACH, *GREEDY, *by_server(server))
    assert "prompts as token ids, extended; answers as its own token ids" in out
    assert len(served) == 24 and ids(served) == greedy[0]


def test_the_engine_gives_the_ids_of_the_hf_backend(model, questions, greedy, tmp_path):
    made, _ = run(model, questions, tmp_path / "r.jsonl", *EACH, *GREEDY, *ENGINE)
    assert len(made) == 24 and ids(made) == greedy[0]
    own, _ = run(model, questions, tmp_path / "own.jsonl", "--tags", "own", *GREEDY, *ENGINE)
    assert ids(own) == greedy[1] and {rollout.tag for rollout in own.values()} & {0, 1}


@pytest.mark.parametrize("mode", ["own", "own-greedy"])
def test_own_tags_come_back_as_ids_and_as_text(model, questions, server, greedy, tmp_path, mode, monkeypatch):
    """As ids, and as a server gives text that knows nothing but the protocol."""
    more = ("--tags", mode, "--samples", "2", *GREEDY)
    served, _ = run(model, questions, tmp_path / "ids.jsonl", *more, *by_server(server))
    assert {rollout.tag for rollout in served.values()} & {0, 1}
    if mode == "own":
        assert {key: row for key, row in ids(served).items() if key[2] == 0} == greedy[1]
    from megatron_ssft.cli import generate

    monkeypatch.setattr(openai_backend, "DIALECTS", (Dialect("token ids", True),))
    arguments = command(model, questions, tmp_path / "text.jsonl", *more, *by_server(server))[4:]
    assert generate.main(arguments, "generate") == 0
    texts = {rollout.key: (rollout.tag, rollout.text) for rollout in read_rollouts(tmp_path / "text.jsonl")}
    assert texts == {key: (rollout.tag, rollout.text) for key, rollout in served.items()}


def test_samples_follow_their_seeds(model, questions, server, tmp_path):
    one_by_one = (*EACH, *WARM, *by_server(server), "--concurrency", "1")
    first, _ = run(model, questions, tmp_path / "a.jsonl", *one_by_one)
    again, _ = run(model, questions, tmp_path / "b.jsonl", *one_by_one)
    other, _ = run(model, questions, tmp_path / "c.jsonl", *one_by_one, "--seed", "6")
    assert ids(again) == ids(first)
    assert sum(other[key].token_ids != rollout.token_ids for key, rollout in first.items()) > 12
    assert len({rollout.token_ids for rollout in first.values()}) > 12, "samples of one question differ"


def test_stop_tokens_end_a_sample(model, questions, server, tmp_path):
    served, _ = run(model, questions, tmp_path / "r.jsonl", "--tags", "each", "--greedy", "--max-new-tokens", "200",
                    *by_server(server))  # fmt: skip
    stops = open_model_folder(model, TagFlags()).stop_ids
    ended = [rollout for rollout in served.values() if rollout.finish_reason == "stop"]
    assert ended
    for rollout in served.values():
        assert (rollout.token_ids[-1] in stops) == (rollout.finish_reason == "stop")
        assert len(rollout.token_ids) <= 200 and "<|im_end|>" not in rollout.text


def test_a_server_that_dies_and_comes_back_loses_nothing(model, questions, server, tmp_path):
    output = tmp_path / "r.jsonl"
    more = ("--tags", "each", "--samples-per-tag", "8", "--temperature", "0.8", "--max-new-tokens", "64")
    arguments = command(model, questions, output, *more, *by_server(server))
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    server.stop()
    try:
        out, err = running.communicate(timeout=120)
        there = {rollout.key: rollout for rollout in read_rollouts(output)}
        assert running.returncode == 2 and "start again to go on" in err and 5 <= len(there) < 64, out + err
        with pytest.raises(UserError, match="no connection"):
            from megatron_ssft.cli import generate

            generate.main(arguments[4:], "generate")
    finally:
        server.start()
    whole, _ = run(model, questions, output, *more, *by_server(server))
    assert len(whole) == 64 and all(whole[key] == rollout for key, rollout in there.items())
    assert read_failed(output) == []
