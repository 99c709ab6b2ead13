"""The images: the CPU image's steps are carried out without Docker.

What they install runs under another user, from a read-only root. Of the GPU image, what it pins and what it installs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import megatron_ssft
from megatron_ssft.cli.main import COMMANDS
from tests.helpers.dockerfile import Builder, below, build_context, read_stages
from tests.helpers.wheels import ROOT, repository_files

STAGES = read_stages(ROOT / "Dockerfile")
IMAGES = ("cpu", "gpu")
ANOTHER_USER = "12345"
NO_NAMESPACE = os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0
LOCKED_PYTHON = re.search(r"python:(3\.\d+)-", STAGES["cpu"].base).group(1)
TRAIN = (
    "megatron-ssft train --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 512 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 2 --lr 1e-3 --tokenizer-type CharTokenizer --num-forking-tokens 4 "
    "--matching-tokens 8 --data-path $WORKSPACE/examples/data/arithmetic_teachers.jsonl --device cpu"
)
USE = {
    "entry points": "megatron-ssft --version && megatron-ssft --help",
    "extras": "python -c 'import wandb, pyarrow'",
    "dry run": f"{TRAIN} --save dry --dry-run && test ! -e dry",
    "training": f"WANDB_MODE=offline {TRAIN} --save run --wandb-project p && wc -l run/metrics.jsonl",
    "parquet": "python -c 'import pyarrow as a, pyarrow.parquet as p; "
    'p.write_table(a.table({"question": ["1+1?"], "answer": ["#### 2"], "id": ["q"]}), "q.parquet")\' '
    "&& python $WORKSPACE/tools/prepare_data.py benchmark --format gsm8k q.parquet --output q.jsonl && cat q.jsonl",
    "report": "megatron-ssft report run --output report.html && grep -c '<svg\\|image/' report.html",
    "read-only": "! touch $WORKSPACE/x && ! touch $(dirname $(command -v megatron-ssft))/x && id -u",
    **{f"{name} --help": f"megatron-ssft {name} --help" for name in COMMANDS},
}
"""What a user of the image does, in this order."""


@pytest.fixture(scope="module")
def image():
    """Root of the CPU image. Not below /tmp, which a container has for itself, and open to other users."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" != LOCKED_PYTHON:
        pytest.skip(f"the image has Python {LOCKED_PYTHON}")
    folder = Path(tempfile.mkdtemp(prefix="ssft-image-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        build_context(ROOT, repository_files(), folder / "context")
        builder = Builder(folder / "context", STAGES, folder)
        builder.build("wheel")
        yield builder.build("cpu")
    finally:
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def used(image) -> dict[str, tuple[int, str]]:
    """Name of each use -> exit status and output. All in one process's namespace, since /tmp is gone with it."""
    steps = "\n".join(
        f"echo '=== {name}'; ( {command} ) </dev/null 2>&1; echo \"=== status $?\"" for name, command in USE.items()
    )
    script = f"set -f\nmkdir /tmp/work-{os.getpid()}\ncd /tmp/work-{os.getpid()}\n{steps}"
    environment = {
        **STAGES["cpu"].pairs("ENV"),
        "PATH": f"{image}/usr/local/bin:/usr/bin:/bin",
        "WORKSPACE": f"{image}/workspace",
        "HOME": "/",  # Docker's for a user without a name
        "OMP_NUM_THREADS": "1",
    }
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), "bash", "-c", script]
    if NO_NAMESPACE:
        subprocess.run(["chmod", "-R", "a-w", image], check=True)
    else:
        words = ["unshare", "--mount", "bash", "-c", read_only_root(Path(sys.base_prefix)), "bash", *words]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, cwd="/")
    shutil.rmtree(f"/tmp/work-{os.getpid()}", ignore_errors=True)
    parts = re.findall(r"^=== (.*)\n((?s:.*?))^=== status (\d+)$", done.stdout, re.MULTILINE)
    assert len(parts) == len(USE), done.stdout
    return {name: (int(status), output) for name, output, status in parts}


def read_only_root(python: Path) -> str:
    """Shell commands: an own /tmp, everything else read-only, another user; then what follows. A Python in a folder
    that only its owner may enter is mounted where the other user can reach it."""
    closed = next((str(p) for p in reversed(python.parents) if p.stat().st_mode & 0o001 == 0), "")
    reach = f"""
mkdir /tmp/python; mount --bind {python} /tmp/python; mount -t tmpfs -o mode=755 none {closed}; mkdir -p {python}
mount --move /tmp/python {python}; mount -o remount,ro,bind {python}; rmdir /tmp/python"""
    return f"""set -e
mount -t tmpfs -o mode=1777 none /tmp{reach if closed else ""}
mount -o remount,ro,bind /
exec setpriv --reuid={ANOTHER_USER} --regid={ANOTHER_USER} --clear-groups --no-new-privs "$@" """


@pytest.mark.slow
@pytest.mark.parametrize("use", USE)
def test_the_image_is_used_by_anybody_with_a_read_only_root(used, use):
    status, output = used[use]
    assert status == 0 and "Traceback" not in output, output


@pytest.mark.slow
def test_what_it_prints(used):
    assert f"megatron-ssft {megatron_ssft.__version__}" in used["entry points"][1]
    assert "2 run/metrics.jsonl" in used["training"][1]
    assert json.loads(used["parquet"][1].splitlines()[-1])["question"].endswith("1+1?")
    assert used["read-only"][1].split()[-1] == (str(os.geteuid()) if NO_NAMESPACE else ANOTHER_USER)
    assert "Matplotlib created a temporary cache directory" not in used["report"][1]


@pytest.mark.slow
def test_every_console_script_is_tried(image):
    (entry_points,) = image.glob("usr/local/lib/python*/site-packages/megatron_ssft-*.dist-info/entry_points.txt")
    assert re.findall(r"^([\w-]+) = ", entry_points.read_text(), re.MULTILINE) == ["megatron-ssft"]


@pytest.mark.slow
def test_nothing_is_left_in_tmp_and_the_packages_agree(image):
    assert list((image / "tmp").iterdir()) == []
    check = subprocess.run([image / "usr/local/bin/python", "-m", "pip", "check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("name", IMAGES)
def test_labels(name):
    labels, arguments = STAGES[name].pairs("LABEL"), STAGES[name].pairs("ARG")
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == "${VERSION}" and arguments["VERSION"] == megatron_ssft.__version__
    assert labels[f"{prefix}revision"] == "${REVISION}" and "REVISION" in arguments
    assert labels[f"{prefix}licenses"] == "Apache-2.0" and labels[f"{prefix}title"].startswith("megatron-ssft")
    assert labels[f"{prefix}base.name"].endswith(STAGES[name].base)


@pytest.mark.parametrize("name", IMAGES)
def test_no_home_is_set(name):
    """pyxis prefers the image's variables: it would hide the user's own folder."""
    assert "HOME" not in STAGES[name].pairs("ENV")


def test_the_gpus_memory_is_not_broken_up_by_microbatches_of_all_lengths():
    assert STAGES["gpu"].pairs("ENV")["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


CARRIED = {
    "apex": "0.1",
    "flash_attn": "2.7.4.post1",
    "numpy": "1.26.4",
    "nvidia-cudnn-frontend": "1.15.0",
    "nvidia_dali_cuda130": "1.52.0",
    "pytorch-triton": "3.5.0+git1",
    "triton_kernels": "1.0.0",
    "torch": "2.10.0a0+b558c986e8.nv25.11",
    "torchvision": "0.25.0a0",
    "transformer_engine": "2.9.0+70f53666",
}
"""Compiled packages of an image, as its pip would list them."""
PURE = {"packaging": "23.2", "PyYAML": "5.0", "wandb": "0.1"}
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m pip list --format=freeze") cat {folder}/list ;;
    "-m pip install "*) printf '%s\\n' "$@" > {folder}/installed; cp "$PIP_CONSTRAINT" {folder}/constraints ;;
    *) echo "python $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def gpu_step(tmp_path) -> Path:
    """A folder with what the GPU image's only step installed, by which constraints; its Python is a stand-in."""
    (command,) = STAGES["gpu"].of("RUN")
    root = tmp_path / "root"
    shutil.copytree(ROOT / "requirements", root / "tmp/requirements")
    (root / "tmp/wheel").mkdir()
    (root / "tmp/wheel/megatron_ssft-1-py3-none-any.whl").touch()
    listed = {**CARRIED, **PURE}
    (tmp_path / "list").write_text("".join(f"{name}=={version}\n" for name, version in listed.items()))
    (tmp_path / "python").write_text(FAKE_PYTHON.format(folder=shlex.quote(str(tmp_path))))
    (tmp_path / "python").chmod(0o755)
    shell = json.loads(STAGES["gpu"].of("SHELL")[0])
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = [*shell, below(root, re.sub(r"--mount=\S+\s+", "", command))]
    done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert {x.name for x in (root / "tmp").iterdir()} == {"requirements", "wheel"}
    return tmp_path


def test_the_gpu_image_pins_what_it_carries_and_takes_the_rest_from_the_lock(gpu_step):
    pins = dict(line.split("==") for line in (gpu_step / "constraints").read_text().splitlines() if line[0] != "#")
    lock = (ROOT / "requirements" / "python-3.12.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lock if not line.startswith("#"))
    assert {name: pins[name] for name in CARRIED} == CARRIED
    assert {name: v for name, v in pins.items() if name not in CARRIED} == {
        name: v for name, v in locked.items() if name.replace("-", "_") not in {c.replace("-", "_") for c in CARRIED}
    }
    assert pins["numpy"] == CARRIED["numpy"] != locked["numpy"] and pins["packaging"] == locked["packaging"]


def test_the_gpu_image_installs_the_wheel_with_its_extras(gpu_step):
    *_, what = (gpu_step / "installed").read_text().splitlines()
    assert re.fullmatch(r".*/megatron_ssft-1-py3-none-any\.whl\[wandb,parquet\]", what)
