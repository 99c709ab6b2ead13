"""The console program: its commands, how it says what is wrong, and that it needs no repository around it."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megatron_ssft.cli
from megatron_ssft.cli import demo
from megatron_ssft.cli.main import COMMANDS, dispatch, overview, program_name
from megatron_ssft.errors import UserError
from megatron_ssft.rounds.commands import Tools
from tests.helpers.paths import ROOT
from tests.helpers.wheels import build_wheel, install_wheel, installed_environment

DOORS = [ROOT / "pretrain_ssft.py", *sorted((ROOT / "tools").glob("*.py"))]
CONSOLE = ["-m", "megatron_ssft.cli"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as pip installs it."""
    folder = tmp_path_factory.mktemp("wheel")
    return install_wheel(build_wheel(folder), folder / "installed")


def run(installed, folder, *words, module=True):
    """A command of the installed copy, started in another folder."""
    start = [sys.executable, *CONSOLE] if module else [str(installed / "bin" / "megatron-ssft")]
    return subprocess.run(
        [*start, *map(str, words)],
        cwd=folder,
        env=installed_environment(installed),
        capture_output=True,
        text=True,
        timeout=180,
    )


# -- the list of commands --------------------------------------------------------------------------------------------


def test_every_program_is_a_command_and_has_a_door():
    modules = {module.name for module in pkgutil.iter_modules(megatron_ssft.cli.__path__)}
    shared = {"__main__", "entry", "main", "memory", "options", "output_forwarder", "rank_output", "run_training"}
    under_another = {"tokenize_data"}  # prepare-data tokenize
    assert modules - shared - under_another == {command.module for command in COMMANDS.values()}
    opened = {re.search(r"from megatron_ssft\.cli\.(\w+) import main\n", door.read_text())[1] for door in DOORS}
    assert opened == {command.module for command in COMMANDS.values()}


def test_commands_are_listed_in_the_order_of_their_use():
    lines = [line.split()[0] for line in overview("p").splitlines() if line.startswith("  ")]
    assert lines == list(COMMANDS)
    use = ["prepare-data", "convert", "train", "select-tag", "generate", "score", "evaluate", "gfpo", "report"]
    assert sorted(use, key=lines.index) == use
    assert max(map(len, overview("megatron-ssft").splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_names_the_command_as_it_was_called(name, capsys):
    with pytest.raises(SystemExit) as end:
        dispatch([name, "--help"], "python -m megatron_ssft.cli")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m megatron_ssft.cli {name} ")


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("/somewhere/bin/megatron-ssft", "megatron-ssft"),
        ("/somewhere/megatron_ssft/cli/__main__.py", "python -m megatron_ssft.cli"),
    ],
)
def test_name_of_the_program(script, name):
    assert program_name(script) == name


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "p: give a command; p --help lists them"),
        (["trian", "--lr", "1"], "p trian: no such command; did you mean train? p --help lists them"),
        (["evaluate_policy"], "p evaluate_policy: no such command; did you mean evaluate-policy? p --help lists them"),
        (["qqq"], "p qqq: no such command; p --help lists them"),
        (["--verbose"], "p --verbose: no such command; p --help lists them"),
    ],
)
def test_what_is_no_command_is_one_line(words, reason):
    with pytest.raises(UserError) as error:
        dispatch(words, "p")
    assert str(error.value) == reason


def test_version(capsys):
    assert dispatch(["--version"], "p") == 0
    assert capsys.readouterr().out == f"megatron-ssft {megatron_ssft.__version__}\n"


def test_help_is_quick_and_imports_nothing_heavy():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-X", "importtime", *CONSOLE, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "gfpo-rounds" in done.stdout
    assert time.monotonic() - begin < 10  # well under a second on a machine that has nothing else to do
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "megatron_ssft.errors" in imported
    assert imported & {"torch", "numpy", "transformers", "yaml", "rich", "matplotlib", "argparse"} == set()


def test_exit_status_and_one_line_from_a_process():
    for words, status in ((["trian"], 2), (["select-tag", "no such run"], 2), (["score"], 2), (["--help"], 0)):
        done = subprocess.run([sys.executable, *CONSOLE, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == (0 if status == 0 else 1) or "usage: " in done.stderr


def test_of_what_libraries_log_only_what_nobody_can_act_on_is_dropped():
    program = """
import logging
from megatron_ssft.cli.entry import run_command
logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
run_command(lambda: [logger.warning(text) for text in ("GPTModel IS DEPRECATED. Use another.", "A checkpoint is bad.")])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "A checkpoint is bad.\n")


# -- doors and stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_doors_are_thin(door):
    """A docstring, imports, and a guard: helper processes import the main module again."""
    docstring, *imports, guard = ast.parse(door.read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in imports)
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == '__main__'"
    assert ast.unparse(guard.body) == "sys.exit(run_command(main))"


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_doors_open(door, tmp_path):
    done = subprocess.run([sys.executable, str(door), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {door.name} ")


def test_no_program_loads_another_by_its_path():
    for path in sorted((ROOT / "megatron_ssft").rglob("*.py")):
        assert not re.search(r"spec_from_file_location|\brunpy\b|/ \"tools\"", path.read_text()), path


def test_stages_are_commands():
    stages = list(dataclasses.astuple(Tools.of_project()))
    stages += [demo.tool("report"), demo.training_command(Path("out"), "single", 1, 8, Path("train"), Path("held"))]
    for words in stages:
        place = list(words).index("megatron_ssft.cli")
        assert words[place - 1] == "-m" and words[place + 1] in COMMANDS


def test_sigterm_ends_the_demo_so_that_it_can_end_its_stages():
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, demo.ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler


# -- outside the repository ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_from_an_installed_copy(installed, tmp_path, name):
    done = run(installed, tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m megatron_ssft.cli {name} ")
    for action in re.findall(r"\{([a-z,]+)\} \.\.\.", done.stdout.splitlines()[0]):
        for word in action.split(","):
            assert run(installed, tmp_path, name, word, "--help").returncode == 0


def test_the_console_script(installed, tmp_path):
    done = run(installed, tmp_path, "select-tag", "--help", module=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: megatron-ssft select-tag ")
    done = run(installed, tmp_path, "trian", module=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megatron-ssft trian: no such command; did you mean train? megatron-ssft --help lists them\n"


@pytest.mark.slow
def test_training_export_and_generation_from_an_installed_copy(installed, tmp_path):
    """Two ranks train; the checkpoint writer's helper processes start from the console module too."""

    def done(*words):
        result = run(installed, tmp_path, *words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    done("demo-data", "--output", "data", "--train", 16, "--held-out", 4)
    flags = (
        "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 64 --lr 1e-3 "
        "--micro-batch-size 8 --global-batch-size 16 --train-iters 2 --tokenizer-type CharTokenizer "
        "--num-forking-tokens 6 --matching-tokens 4 --data-path data/train.jsonl --data-cache-path cache --save run"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    trained = subprocess.run(
        [sys.executable, *launcher, *CONSOLE, "train", *flags.split(), "--tensor-model-parallel-size", "2"],
        cwd=tmp_path, env=installed_environment(installed), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "verified" in done("convert", "export", "run", "hf")
    done("generate", "--model", "hf", "--data", "data/heldout.jsonl", "--output", "R.jsonl", "--max-new-tokens", 4)
    rows = [json.loads(line) for line in (tmp_path / "R.jsonl").read_text().splitlines()]
    assert sorted((row["id"], row["tag"]) for row in rows) == sorted(
        (id, tag) for id in {row["id"] for row in rows} for tag in range(6)
    )
    assert len(rows) == 24
