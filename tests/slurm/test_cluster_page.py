"""The commands of docs/cluster.md, one after the other: from the container to the model after GFPO.

They run as they stand, with a tiny model under the large one's name and stand-ins for what is not here: docker, enroot,
vllm, and a sbatch that adds what makes a job small.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.distributed import free_port
from tests.helpers.hf_models import random_model
from tests.helpers.markdown_pages import blocks
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "cluster.md"
STEPS = 12
"""Two epochs."""
SMALL_RECIPE = {
    "tensor_model_parallel_size": 2,
    "num_forking_tokens": 6,
    "matching_tokens": 16,
    "seq_length": 32768,
    "max_tokens_per_microbatch": 4096,
    "global_batch_size": 32,
    "train_iters": STEPS,
    "lr": 1e-3,
    "save_interval": 6,
    "export_hf_at_save": True,
    "device": "cpu",
}
"""In the place of ssft-32b.yaml, whose tokens it needs too."""
POLICY_RECIPE = {
    "tensor_model_parallel_size": 2,
    "objective": "gfpo-exact",
    "trainable": "last-2",
    "seq_length": 32768,
    "max_tokens_per_microbatch": 4096,
    "questions_per_step": 4,
    "max_truncated_share": 1.0,  # the server of the tests writes no end
    "device": "cpu",
}
LOOP_ARGUMENTS = (
    "--train-iters 2 --questions-per-round 8 --samples-per-tag 2 --verifier exact --lr 1e-3 "
    "--generate-args '--max-new-tokens 6 --concurrency 2'"
)
STAND_INS = {
    "docker": 'echo "docker $*"',
    "enroot": 'echo "enroot $*"',
    "vllm": """
[[ $1 == serve && $3 == --port ]] || exit 2
SLURMD_NODENAME=n1 setsid {python} -m tests.slurm.answering_server "$2" "$4" {folder}/served > {folder}/vllm.out 2>&1 &
until curl -sf "http://localhost:$4/v1/models" > /dev/null; do sleep 0.2; done
""",
    "sbatch": """
unset CONTAINER_IMAGE
export PYTHON={python} OMP_NUM_THREADS=1
if [[ $* == *gfpo_loop* ]]; then
    export RECIPE={folder}/policy.yaml
    export SERVER="{python} -m tests.slurm.answering_server {{model}} {{port}} {folder}/asked"
    set -- "$@" {loop_arguments}
else
    export RECIPE={folder}/recipe.yaml
fi
exec {sbatch} --wait --ntasks-per-node=1 --cpus-per-task=1 --output={folder}/%x.out "$@"
""",
}


@pytest.fixture
def folder(tmp_path):
    """Where the user stands: the repository's folder, with a model and released data beside it."""
    for name in ("examples", "tools", "pretrain_ssft.py", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    random_model(
        tmp_path / "Qwen2.5-32B-Instruct", "qwen2", tied=False, hidden_size=64, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=32768,
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SMALL_RECIPE))
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(POLICY_RECIPE))
    teachers = {"s1k": ("gemini",), "s1k-1.1": ("deepseek",), "more": ("qwen", "gpt")}
    for name, sources in teachers.items():
        write(tmp_path / f"{name}.jsonl", [s1k_row(i, sources) for i in range(50)])
    write(tmp_path / "aime24.jsonl", [{"id": 1, "problem": "What is 1 + 0?", "answer": "1", "year": "2024"}])
    write(tmp_path / "prompts.jsonl", [{"id": f"q{i}", "question": f"{i}?", "answer": "1"} for i in range(8)])
    for name in ("served", "asked", "bin"):
        (tmp_path / name).mkdir()
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def s1k_row(i: int, sources: tuple[str, ...]) -> dict:
    """A question in s1K's columns."""
    row = {"question": f"What is {i} + {i}?", "solution": str(2 * i), "cot_type": "math"}
    for source in sources:
        row |= {f"{source}_thinking_trajectory": f"{source}: {i} and {i}", f"{source}_attempt": f"so {2 * i}"}
    return row


def page_commands() -> str:
    """The blocks of the page's way from the container to the evaluated model, as one script."""
    way = PAGE.read_text().partition("\n## Recipes")[0].count("\n")
    return "\n".join(block.text for block in blocks(PAGE) if block.line < way)


def test_the_way_through_the_page(cluster, folder):
    values = {
        "python": sys.executable,
        "folder": folder,
        "sbatch": shutil.which("sbatch", path=cluster.environment["PATH"]),
        "loop_arguments": LOOP_ARGUMENTS,
    }
    for name, body in STAND_INS.items():
        (folder / "bin" / name).write_text("#!/usr/bin/env bash\n" + body.format(**values))
        (folder / "bin" / name).chmod(0o755)
    script = page_commands()
    assert script.count("sbatch --nodes=2") == 2 and script.count("iter_0000735") == 2
    script = script.replace("iter_0000735", f"iter_{STEPS:07d}")
    script = re.sub(r"\b8000\b", str(free_port()), script)  # of this machine
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    result = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=folder, env=cluster.environment | {"PATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    told = "\n".join([result.stdout, result.stderr[-6000:], *(p.read_text()[-6000:] for p in folder.glob("*.out"))])
    subprocess.run(["pkill", "-f", f"answering_server .* {folder}/served"])
    assert result.returncode == 0, told

    assert len(list((folder / "runs" / "32b" / "data_cache").iterdir())) == 2  # the job found the tokens
    assert (folder / "runs" / "32b" / f"iter_{STEPS:07d}" / "hf" / "model.safetensors").exists()
    assert (folder / "runs" / "32b" / "report.html").exists()
    assert list((folder / "evaluation").iterdir())
    work = folder / "runs" / "32b-gfpo"
    final = json.loads((work / "finished.json").read_text())["hf"]
    assert final.startswith("round_001") and (work / final / "model.safetensors").exists()
    asked = {path.name: int(path.read_text()) for path in (folder / "asked").iterdir()}
    assert len(asked) == 2 and min(asked.values()) > 0, asked  # a server on each node, and both were asked
