"""tools/generate.py as a user starts it, kills it and starts it again; vLLM by a stand-in of its interface."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ssft.errors import UserError
from megatron_ssft.formats import rollouts
from megatron_ssft.formats.forking_tokens import write_forking_tokens
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.generation.model_folder import TagFlags
from megatron_ssft.generation.requests import Request, Sampling
from megatron_ssft.generation.run import Options, generate_file
from megatron_ssft.generation.vllm_backend import VLLMBackend
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.hf_models import random_model
from tests.helpers.paths import ROOT

SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=0, max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An export with three tags of format special."""
    parent = tmp_path_factory.mktemp("models")
    base = random_model(parent / "base", "qwen2", False)
    tags = build_forking_tokens(HuggingFaceTokenizer(str(base)), 3, "special", None)
    write_assets(base, parent / "tagged", tags, 301, "float32")
    (parent / "tagged" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    write_forking_tokens(parent / "tagged", tags)
    return parent / "tagged"


@pytest.fixture
def data(tmp_path):
    rows = [{"id": f"q{i}", "question": f"What is {i} plus {i * i}?", "answer": "?"} for i in range(5)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(model, data, output, tags="each", sampling=SAMPLING, seed=1, **changes):
    """Summary, and what was printed."""
    console = Console(width=100, record=True, file=io.StringIO())
    options = Options(
        model=model, data=data, output=output, tags=tags, sampling=sampling, seed=seed, device="cpu", **changes
    )
    return generate_file(options, console), console.export_text()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_key(path):
    return {rollout.key: rollout for rollout in read_rollouts(path)}


def command(model, data, output, *more):
    flags = ["--model", model, "--data", data, "--output", output, "--tags", "each", "--samples-per-tag", "4"]
    flags += ["--temperature", "0.7", "--top-p", "0.95", "--max-new-tokens", "64", "--seed", "1", "--device", "cpu"]
    return [sys.executable, str(ROOT / "tools" / "generate.py"), *map(str, flags), *more]


def start(arguments, **settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


# -- the file --------------------------------------------------------------------------------------------------------


def test_lines_hold_what_is_promised(model, data, tmp_path):
    generate(model, data, tmp_path / "r.jsonl", samples_per_tag=2)
    rows = lines(tmp_path / "r.jsonl")
    assert len(rows) == 5 * 3 * 2
    assert set(rows[0]) == {
        *("id", "tag", "sample", "text", "token_ids", "finish_reason", "seed", "sampling", "model", "tokenizer"),
        *("prompt", "question"),
    }
    assert rows[0]["sampling"] == {
        "mode": "each",
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 0,
        "max_new_tokens": 6,
        "seed": 1,
        "tags": "special, 3: <think1>",
        "backend": "hf",
        "dtype": "float32",
    }
    tokenizer = HuggingFaceTokenizer(str(model))
    for row in rows:
        stopped = row["finish_reason"] == "stop"
        assert row["text"] == tokenizer.decode(row["token_ids"][:-1] if stopped else row["token_ids"])
        assert (row["token_ids"][-1] in (0, 2)) == stopped
        assert stopped or len(row["token_ids"]) == 6
    assert len({tuple(row["token_ids"]) for row in rows}) > 20


def test_modes_agree_where_they_ask_for_the_same(model, data, tmp_path):
    generate(model, data, tmp_path / "each.jsonl", samples_per_tag=2)
    generate(model, data, tmp_path / "robin.jsonl", "round-robin", samples=4)
    generate(model, data, tmp_path / "fixed.jsonl", "fixed", tag="<think2>", samples=2)
    each, robin, fixed = (by_key(tmp_path / f"{name}.jsonl") for name in ("each", "robin", "fixed"))
    assert {key[1:] for key in robin} == {(0, 0), (1, 0), (2, 0), (0, 1)}
    assert {key[1:] for key in fixed} == {(1, 0), (1, 1)}
    for key, rollout in [*robin.items(), *fixed.items()]:
        assert rollout.token_ids == each[key].token_ids


def test_a_model_without_tags(model, data, tmp_path):
    base = model.parent / "base"
    generate(base, data, tmp_path / "r.jsonl", "none", samples=3, limit=2)
    rows = lines(tmp_path / "r.jsonl")
    assert {(row["id"], row["tag"], row["sample"]) for row in rows} == {
        (q, None, s) for q in ("q0", "q1") for s in range(3)
    }
    assert "tags" not in rows[0]["sampling"]
    with pytest.raises(UserError, match="no forking_tokens.json"):
        generate(base, data, tmp_path / "other.jsonl")
    generate(base, data, tmp_path / "other.jsonl", tag_flags=TagFlags(3))
    assert len(lines(tmp_path / "other.jsonl")) == 15


@pytest.mark.skipif("none" not in rollouts.MODES, reason="rollouts.MODES does not list none")
def test_a_model_without_tags_is_gone_on_with(model, data, tmp_path):
    generate(model.parent / "base", data, tmp_path / "r.jsonl", "none", samples=1)
    generate(model.parent / "base", data, tmp_path / "r.jsonl", "none", samples=2)
    assert len(by_key(tmp_path / "r.jsonl")) == 10


def text_tagged(model, tmp_path):
    """The same model with tags that it writes by itself: single letters."""
    folder = tmp_path / "letters"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tags = build_forking_tokens(HuggingFaceTokenizer(str(model)), 9, "text", "{i}")
    write_forking_tokens(folder, tags)
    return folder


def test_the_models_own_choice(model, data, tmp_path):
    """Digits are tags here: the first one that is written decides, and what follows its token is the sample."""
    folder = text_tagged(model, tmp_path)
    hot = Sampling(temperature=3.0, top_p=1.0, top_k=0, max_new_tokens=20)
    generate(folder, data, tmp_path / "own.jsonl", "own", sampling=hot, samples=20)
    generate(folder, data, tmp_path / "none.jsonl", "none", sampling=hot, samples=20)
    raw = {(r["id"], r["sample"]): r for r in lines(tmp_path / "none.jsonl")}
    tokenizer = HuggingFaceTokenizer(str(model))
    tags = set()
    for row in lines(tmp_path / "own.jsonl"):
        whole = raw[row["id"], row["sample"]]
        assert whole["token_ids"][len(whole["token_ids"]) - len(row["token_ids"]) :] == row["token_ids"]
        digits = [c for c in whole["text"] if c in "123456789"]
        assert row["tag"] == (int(digits[0]) - 1 if digits else None)
        stopped = row["finish_reason"] == "stop"
        assert row["text"] == tokenizer.decode(row["token_ids"][:-1] if stopped else row["token_ids"])
        assert digits or row["token_ids"] == whole["token_ids"]
        tags.add(row["tag"])
    assert None in tags and len(tags) > 3


def test_greedy_choice_then_samples(model, data, tmp_path):
    """The tag stands at the end of the greedy text; what follows are samples after it."""
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=200)
    generate(model, data, tmp_path / "greedy.jsonl", "none", sampling=greedy)
    written = {row["id"]: row["token_ids"] for row in lines(tmp_path / "greedy.jsonl")}
    tokenizer = HuggingFaceTokenizer(str(model))
    # Whatever this random model writes third is made a tag.
    folder = text_tagged(model, tmp_path)
    marks = sorted({tokenizer.decode([ids[2]]) for ids in written.values() if len(ids) > 2})
    marks = [mark for mark in marks if mark.isascii() and mark.strip()]
    assert marks, written
    ids = [tokenizer.encode(mark) for mark in marks]
    (folder / "forking_tokens.json").write_text(json.dumps({"format": "text", "strings": marks, "ids": ids}))
    generate(folder, data, tmp_path / "r.jsonl", "own-greedy", samples=3)
    rows = lines(tmp_path / "r.jsonl")
    assert {(row["id"], row["sample"]) for row in rows} == {(f"q{i}", s) for i in range(5) for s in range(3)}
    chosen = {name: {row["tag"] for row in rows if row["id"] == name} for name in written}
    with_tag = {name for name, tags in chosen.items() if tags != {None}}
    for name, token_ids in written.items():
        ends = [n for n in range(1, len(token_ids) + 1) if any(m in tokenizer.decode(token_ids[:n]) for m in marks)]
        if ends:
            assert len(chosen[name]) == 1
            assert marks[chosen[name].pop()] in tokenizer.decode(token_ids[: ends[0]])
    assert with_tag
    before = (tmp_path / "r.jsonl").read_bytes()
    generate(folder, data, tmp_path / "r.jsonl", "own-greedy", samples=3)
    assert (tmp_path / "r.jsonl").read_bytes() == before


# -- going on --------------------------------------------------------------------------------------------------------


def test_a_cut_file_is_completed_as_if_nothing_had_happened(model, data, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    generate(model, data, whole, samples_per_tag=2)
    content = whole.read_bytes()
    for size in (0, 1, len(content) // 3, len(content) // 2, len(content) - 1, len(content)):
        cut.write_bytes(content[:size])
        summary, printed = generate(model, data, cut, samples_per_tag=2, batch_size=7)
        assert by_key(cut) == by_key(whole)
        there = content[:size].count(b"\n")
        assert summary.samples == 30 - there
        assert (f"{there} of 30 samples were there" in printed) == (0 < there < 30)


def test_more_samples_and_more_questions_can_be_added(model, data, tmp_path):
    output = tmp_path / "r.jsonl"
    generate(model, data, output, samples_per_tag=1, limit=2)
    first = by_key(output)
    generate(model, data, output, samples_per_tag=2)
    assert len(by_key(output)) == 30
    assert all(by_key(output)[key] == rollout for key, rollout in first.items())


def test_what_does_not_fit_the_file_is_refused(model, data, tmp_path):
    output = tmp_path / "r.jsonl"
    generate(model, data, output)
    before = output.read_bytes()
    base = model.parent / "base"
    others = tmp_path / "others.jsonl"
    others.write_text('{"id": "other", "question": "Why?"}\n')
    for changes, reason in [
        ({"seed": 2}, "seed 1 before and 2 now"),
        ({"sampling": Sampling(0.8, 0.95, 0, 6)}, "temperature 0.9 before and 0.8 now"),
        ({"tags": "own"}, "mode"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model": base, "tag_flags": TagFlags(3)}, "made by another run"),
        ({"data": others}, "question 'q0', which is not in"),
    ]:
        arguments = {"model": model, "data": data, "output": output, **changes}
        with pytest.raises(UserError, match=reason):
            generate(**arguments)
    assert output.read_bytes() == before


def test_a_question_asked_otherwise_under_its_id_is_refused(model, data, tmp_path):
    output = tmp_path / "r.jsonl"
    generate(model, data, output)
    before, rows = output.read_bytes(), lines(data)
    assert len({(row["id"], row["prompt"]) for row in lines(output)}) == 5  # one prompt under all tags
    rows[1]["answer"] = "!"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(model, data, output)
    rows[1]["question"] += "?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = next(number for number, row in enumerate(lines(output), start=1) if row["id"] == "q1")
    reason = f"r.jsonl:{line}: id 'q1': the question's prompt is not .*; give another --output"
    with pytest.raises(UserError, match=reason):
        generate(model, data, output, samples_per_tag=2)
    assert output.read_bytes() == before


@pytest.mark.slow
def test_the_command_killed_at_any_time_goes_on(model, data, tmp_path):
    """SIGKILL as soon as some lines are there, twice; then it runs to the end and equals a run never killed."""
    output = tmp_path / "r.jsonl"
    # One sample at a time, so that there is time to be killed in.
    arguments = command(model, data, output, "--batch-size", "1")
    for lines_to_wait_for in (3, 20):
        process = start(arguments)
        deadline = time.monotonic() + 120
        while not output.exists() or output.read_bytes().count(b"\n") < lines_to_wait_for:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at = output.read_bytes().count(b"\n")
        assert lines_to_wait_for <= killed_at < 60
    process = start(arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert f"{killed_at} of 60 samples were there" in out
    assert f"{60 - killed_at} samples, " in out and "tokens/s" in out
    assert err == ""
    warm = Sampling(temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=64)
    generate(model, data, tmp_path / "whole.jsonl", sampling=warm, samples_per_tag=4)
    assert by_key(output) == by_key(tmp_path / "whole.jsonl")


def test_wrong_flags_end_with_one_line(model, data, tmp_path):
    process = start(command(model, data, tmp_path / "r.jsonl", "--backend", "openai"))
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert err == "--backend openai and --base-url go together; give both or neither\n"


# -- vLLM ------------------------------------------------------------------------------------------------------------


class StandIn(types.ModuleType):
    """The part of vLLM's interface that is used; answers a prompt with its last id, the seed, and an end."""

    def __init__(self):
        super().__init__("vllm")
        self.engines, self.calls = [], []
        module = self

        class SamplingParams:
            def __init__(self, *, temperature, top_p, top_k, max_tokens, seed, stop_token_ids, detokenize):
                assert top_k == -1 or top_k > 0
                self.__dict__.update(locals())

        class LLM:
            def __init__(self, *, model, dtype, tensor_parallel_size, enable_prefix_caching):
                module.engines.append((model, dtype, tensor_parallel_size, enable_prefix_caching))

            def generate(self, prompts, sampling_params, *, use_tqdm):
                module.calls.append((prompts, sampling_params))
                return [answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

        def answer(ids, settings):
            tokens = [ids[-1], settings.seed % 200 + 5, *settings.stop_token_ids[:1]][: settings.max_tokens]
            reason = "stop" if tokens[-1] in settings.stop_token_ids else "length"
            return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens, finish_reason=reason)])

        self.SamplingParams, self.LLM = SamplingParams, LLM


def test_vllm_gets_ids_and_a_seed_for_every_sample(model, data, tmp_path, monkeypatch):
    vllm = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    generate(
        model, data, tmp_path / "r.jsonl", backend="vllm", tensor_parallel_size=4, batch_size=20, samples_per_tag=2
    )
    assert vllm.engines == [(str(model), "auto", 4, True)]
    assert [len(prompts) for prompts, _ in vllm.calls] == [20, 10]
    assert {(s.temperature, s.top_p, s.top_k, s.max_tokens) for s in vllm.calls[0][1]} == {(0.9, 0.95, -1, 6)}
    found = by_key(tmp_path / "r.jsonl")
    assert len(found) == 30
    for (_, tag, _), rollout in found.items():
        assert rollout.token_ids == (290 + tag, rollout.seed % 200 + 5, 0)
        assert rollout.finish_reason == "stop"
        assert rollout.sampling["backend"] == "vllm"


def test_vllm_greedy_starts_end_with_the_tag(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", StandIn())
    backend = VLLMBackend(Path("m"), SAMPLING, frozenset({2}))
    requests = [Request(f"q{i}", (7, 8), (40 + i,), None, 0, i, 256) for i in range(3)]
    assert backend.greedy(requests, lambda ids: ids[-1] in (41, 7)) == {"q1": (41,), "q2": (42, 7)}


def test_without_vllm_there_is_one_line(model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vLLM is not installed; pip install"):
        generate(model, data, tmp_path / "r.jsonl", backend="vllm")
