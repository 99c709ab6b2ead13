"""The online loop over the real programs: killed in each stage, it ends with the same policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.helpers.online_loop import Place
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run whose two tags lead to the answers 1 and 2, without an export; and questions where one is right."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"id": f"q{i}", "question": f"{i}?", "answer": str(1 + i % 2),
         "traces": [{"text": "a#1", "source": "a"}, {"text": "bb#2", "source": "b"}]}
        for i in range(24)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 32 --lr 1e-2 "
        "--micro-batch-size 16 --global-batch-size 16 --train-iters 40 --tokenizer-type CharTokenizer "
        "--num-forking-tokens 2 --forking-token-init noise --matching-tokens 2"
    )
    command = [sys.executable, str(ROOT / "pretrain_ssft.py"), *flags.split(), "--save", str(folder / "run"),
               "--data-path", str(folder / "questions.jsonl"), "--data-cache-path", str(folder / "cache")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


class RealPlace(Place):
    """The loop over the real programs, training on two ranks."""

    def __init__(self, folder, trained):
        folder.mkdir()
        self.folder, self.work, self.trained, self.started = folder, folder / "work", trained, []

    def start(self):
        flags = "--rounds 1 --train-iters 4 --lr 1e-2 --verifier exact --samples-per-tag 2 --nproc 2 --seed 3"
        further = {
            "--generate-args": "--max-new-tokens 6 --batch-size 2 --device cpu",
            "--score-args": "--workers 1",
            "--train-args": "--tensor-model-parallel-size 2 --save-interval 1 --max-tokens-per-microbatch 400",
        }
        command = [
            sys.executable, str(ROOT / "tools" / "run_gfpo.py"), "--load", str(self.trained / "run"),
            "--data", str(self.trained / "questions.jsonl"), "--save", str(self.work), "--questions-per-round", "16",
            *flags.split(),
        ]  # fmt: skip
        with open(self.folder / "out", "a") as out, open(self.folder / "err", "a") as err:
            process = subprocess.Popen(
                [*command, *(word for pair in further.items() for word in pair)],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=err,
            )  # fmt: skip
        self.started.append(process)
        return process

    def weights(self):
        """The final Hugging Face folder's tensors."""
        hf = self.work / json.loads((self.work / "finished.json").read_text())["hf"]
        return (hf / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_in_each_stage_it_ends_with_the_same_policy(trained, tmp_path):
    whole, killed = RealPlace(tmp_path / "whole", trained), RealPlace(tmp_path / "killed", trained)
    status, _, err = whole.finish(whole.start())
    assert status == 0, err
    rewards = [json.loads(line) for line in (whole.work / "round_000" / "rewards.jsonl").read_text().splitlines()]
    assert len(rewards) == 16 and any(len(set(row["sum"])) == 2 for row in rewards)

    folder = killed.work / "round_000"
    stages = {  # what is there when the stage is half-way, and is not there before
        "export": lambda: (folder / ".hf.partial").exists(),
        "generate": lambda: (folder / "rollouts.jsonl").exists() and (folder / "rollouts.jsonl").stat().st_size > 0,
        "score": lambda: (folder / "scores.jsonl").exists(),
        "train": lambda: (folder / "run" / "iter_0000002").exists(),
    }
    for stage, is_half_way in stages.items():
        process = killed.start()
        deadline = time.monotonic() + 120
        while not is_half_way():
            assert process.poll() is None and time.monotonic() < deadline, (killed.folder / "err").read_text()
            time.sleep(0.002)
        process.kill()
        process.wait()
        recorded = json.loads((folder / "stages.json").read_text())
        assert stage in recorded and "seconds" not in recorded[stage], f"too late for {stage}"
    assert not (folder / "run" / "finished.json").exists()
    status, out, err = killed.finish(killed.start())
    assert status == 0, err
    assert out.count("steps 1 to 4") == 1  # the last call went on from a checkpoint
    assert killed.left_behind() == []
    for name in ("questions", "rollouts", "scores", "rewards"):
        one, other = (
            sorted((p.work / "round_000" / f"{name}.jsonl").read_text().splitlines()) for p in (whole, killed)
        )
        assert one == other, name
    assert killed.weights() == whole.weights()
    assert (trained / "run" / "iter_0000040").exists() and not (trained / "run" / "iter_0000040" / "hf").exists()
