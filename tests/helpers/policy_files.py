"""Small inputs of policy learning: questions, completions under every tag, their scores and rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.data.questions import read_questions
from megatron_ssft.formats.rewards import write_rewards
from megatron_ssft.formats.rollouts import Rollout, mark, score_rollout, to_line
from megatron_ssft.objectives.policy.inputs import read_inputs
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from megatron_ssft.tokenizers.vocabulary import build_vocabulary

TAGS = 3
MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "make_vocab_size_divisible_by": 8,
    "seq_length": 64,
    "tokenizer_type": "CharTokenizer",
    "num_forking_tokens": TAGS,
}


@dataclass
class Files:
    """Where things are."""

    data: Path
    rollouts: Path
    scores: Path
    rewards: Path


def is_right(question, tag, sample):
    """The reward of a completion: tags differ, and so do samples."""
    return (question + 2 * tag + sample) % 3 == 0


def make_rollout(number, tag, sample, prompt, mode="each", **changes):
    text = "x" * (1 + (number + (tag or 0)) % 4) + f"{sample}"
    values = {
        "id": f"q{number}",
        "tag": tag,
        "sample": sample,
        "finish_reason": "stop",
        "seed": 100 * number + 10 * (tag or 0) + sample,
        "sampling": {"mode": mode, "temperature": 1.0},
        "model": "model-a",
        "tokenizer": "tokenizer",
        "text": text,
        "token_ids": (*text.encode(), 256),
        "prompt": prompt,
    }
    return Rollout(**values | changes)


def write_files(folder, questions=6, samples=2, model="model-a", mode="each", change=lambda rollout: rollout):
    """Questions with `samples` completions under every tag, or without tags. `change` is applied to each rollout."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(*(folder / name for name in ("Q.jsonl", "R.jsonl", "S.jsonl", "W.jsonl")))
    rows = [{"id": f"q{i}", "question": f"what is {i}?"} for i in range(questions)]
    files.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_tokenizer("CharTokenizer", None)
    prompts = [mark(list(encode_prompt(example, tokenizer))) for example in read_questions(files.data)]
    tags = [None] if mode == "none" else range(TAGS)
    rollouts = [
        change(make_rollout(i, tag, sample, prompts[i], mode, model=model))
        for i in range(questions)
        for tag in tags
        for sample in range(samples)
    ]
    scored = [score(r) for r in rollouts if r is not None]
    files.rollouts.write_text("".join(to_line(r) for r in rollouts if r is not None))
    files.scores.write_text("".join(map(to_line, scored)))
    write_rewards(files.rewards, scored, files.rollouts, files.scores)
    return files


def score(rollout):
    right = is_right(int(rollout.id[1:]), rollout.tag or 0, rollout.sample)
    return score_rollout(rollout, correct=right, answer="1", verdict="correct" if right else "wrong", verifier="exact")


def make_config(files, **changes):
    """A configuration of policy learning on the files; None leaves a value out."""
    values = MODEL | {
        "data": str(files.data),
        "rewards": str(files.rewards),
        "save": str(files.data.parent / "run"),
        "train_iters": 3,
        "seed": 5,
    }
    return build_config({k: v for k, v in (values | changes).items() if v is not None}, GFPOConfig)


def read(files, planned_iters=3, **changes):
    """`read_inputs` of such a configuration."""
    config = make_config(files, **changes)
    return read_inputs(config, build_vocabulary(config.run), planned_iters)


def edit_lines(path, edit):
    """Replace each row of a JSONL file by `edit(row)`; None drops it."""
    rows = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))
    return path
