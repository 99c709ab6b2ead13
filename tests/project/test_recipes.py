"""examples/recipes: each starts with a model of its size and data of the paper's size, and is what its comments say."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
from msgspec import structs

from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.data.questions import read_questions
from megatron_ssft.formats.rollouts import mark
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.captured import run_captured
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import chatml_tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.policy_files import write_files
from tests.helpers.shape_folders import shape_folder

RECIPES = ROOT / "examples" / "recipes"
QUESTIONS, TRACES = 1000, 4
"""Of s1k-4mixed."""

# Size of the model, ranks of one replica, steps (about 31 or 32 per epoch come of one trace a question), a checkpoint.
PLANS = {
    "ssft-32b": ("32b", 8, 756, "524 GB"),
    "ssft-32b-tag-rate": ("32b", 8, 756, "524 GB"),
    "ssft-32b-random": ("32b", 8, 756, "524 GB"),
    "sft-32b-mixed": ("32b", 8, 756, "524 GB"),
    "sft-32b-tags": ("32b", 8, 756, "524 GB"),
    "sft-32b-single-target": ("32b", 8, 192, "524 GB"),
    "ssft-32b-code": ("32b", 8, 756, "524 GB"),
    "ssft-math-7b": ("7b", 4, 378, "122 GB"),
}


def dry_runs(commands):
    """stdout of each program with its words, one after the other in one process."""
    import importlib

    from megatron_ssft.cli.entry import run_command

    outputs = {}
    for name, (program, words) in commands.items():
        sys.argv = [program, *words]
        status, out, err = run_captured(lambda program=program: run_command(importlib.import_module(program).main))
        assert status == 0, (name, err)
        outputs[name] = out
    return outputs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models by size, shapes and tokenizers without weights."""
    folder = tmp_path_factory.mktemp("recipes")
    models = {size: shape_folder(folder / size, size) for size in ("32b", "7b")}
    for model in models.values():
        chatml_tokenizer(model, qwen_rules=True)
    rows = [
        {"id": f"q{i}", "question": f"{i}?", "answer": "1", "traces": [{"text": f"{i} {j} 1"} for j in range(TRACES)]}
        for i in range(QUESTIONS)
    ]
    (folder / "sets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, models


@pytest.fixture(scope="module")
def outputs(folders):
    folder, models = folders
    commands = {}
    for name, (size, *_) in PLANS.items():
        flags = ["--load", models[size], "--data-path", folder / "sets.jsonl", "--save", folder / "run"]
        commands[name] = ("megatron_ssft.cli.train", words(name, *flags, "--data-cache-path", folder / "cache"))
    (outputs,) = run_ranks(1, dry_runs, commands, timeout=300)
    return outputs


def words(recipe, *flags):
    return ["--config", str(RECIPES / f"{recipe}.yaml"), *map(str, flags), "--dry-run"]


def comments(name):
    """What a recipe says above its settings, as one line."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.strip("# -") for line in lines if line.startswith("#"))


def test_all_recipes_are_here():
    assert {path.stem for path in RECIPES.iterdir()} == {*PLANS, "gfpo-32b"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_recipe_starts(outputs, name):
    _, ranks, steps, size = PLANS[name]
    assert f"ranks: {ranks}, data-parallel 1" in outputs[name]
    told = int(re.search(r"steps: .*about (\d+) in all", outputs[name]).group(1))
    assert abs(told - steps) <= 0.02 * steps
    assert f"checkpoints: {size} each" in outputs[name]
    assert re.search(r"warm-up (\d+)", outputs[name]).group(1) == str(math.ceil(0.05 * told))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_comments_are_true(outputs, name):
    said = comments(name)
    _, _, steps, size = PLANS[name]
    per_epoch = int(re.search(r"steps: about (\d+) per epoch", outputs[name]).group(1))
    assert f"about {size} each" in said
    interval = int(re.search(r"(?m)^save_interval: (\d+)", outputs[name]).group(1))
    if "one per epoch of" in said:
        assert f"one per epoch of {interval} steps" in said
        assert abs(interval - per_epoch) <= 0.02 * per_epoch
    assert "megatron-ssft prepare-data" in said and "layout: TP" in said and "GPUs" in said


@pytest.mark.slow
def test_the_recipe_of_gfpo_starts(folders, tmp_path):
    _, models = folders
    tokenizer = HuggingFaceTokenizer(str(models["32b"]))
    files = write_files(tmp_path / "first")
    prompts = {example.id: mark(list(encode_prompt(example, tokenizer))) for example in read_questions(files.data)}
    files = write_files(tmp_path / "files", change=lambda rollout: structs.replace(rollout, prompt=prompts[rollout.id]))
    flags = ["--load", models["32b"], "--data", files.data, "--rewards", files.rewards, "--save", tmp_path / "run"]
    command = ("megatron_ssft.cli.gfpo", words("gfpo-32b", *flags, "--num-forking-tokens", 3, "--train-iters", 10))
    (outputs,) = run_ranks(1, dry_runs, {"gfpo": command}, timeout=120)
    print(outputs["gfpo"])
    assert "ranks: 8, data-parallel 1" in outputs["gfpo"]
