"""Breaking a rule of `make lint` is seen: formatter, linter, type checker, checks of shell scripts and Dockerfile.

The import contracts have a file of their own, test_import_contracts.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


def tool(name):
    """The program of this environment, or the one on the path; the test is skipped without either."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed: it comes with the [dev] extra")
    return program


def run(*command, cwd=ROOT, text=None):
    return subprocess.run(list(map(str, command)), cwd=cwd, input=text, capture_output=True, text=True, timeout=120)


def codes(file, source):
    """Codes of the linter's rules that this text would break if it stood in `file`."""
    done = run(tool("ruff"), "check", "--output-format=json", f"--stdin-filename={file}", "-", text=source)
    assert done.returncode in (0, 1), done.stderr
    return {row["code"] for row in json.loads(done.stdout)}


def test_lint_runs_all_checks():
    """The checks of the Makefile are those that this file and its neighbour look at."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    programs = re.findall(r"\$\(VENV\)/bin/(\S+(?: (?:check|format --check))?)", recipe)
    assert programs == ["ruff check", "ruff format --check", "mypy", "lint-imports", "hadolint", "shellcheck"]
    assert "bash -n $$script || exit 1" in recipe


# -- formatter and linter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "status"), [("x = 1\n", 0), ("x = [1,\n 2]\n", 1), ("x = 'a'\n", 1)])
@pytest.mark.parametrize("file", ["megatron_ssft/x.py", "megatron_ssft/parallel/x.py", "tests/x.py"])
def test_unformatted_file_is_found(file, source, status):
    assert run(tool("ruff"), "format", "--check", f"--stdin-filename={file}", "-", text=source).returncode == status


LINT_ERRORS = {
    "E711": "x = y == None\n",
    "E501": "x = '" + 120 * "x" + "'\n",
    "F401": "import os\n",
    "W291": "x = 1 \n",
    "I001": "import sys\nimport os\n",
    "B006": "def f(x=[]): ...\n",
    "UP007": "from typing import Union\nx: Union[int, str]\n",
    "ANN001": "def f(x): ...\n",
    "ANN201": "def f(): ...\n",
    "ANN204": "class A:\n    def __init__(self): ...\n",
    "BLE001": "try:\n    f()\nexcept Exception:\n    pass\n",
    "RUF100": "x = 1  # noqa: E501\n",
    "C408": "x = dict(a=1)\n",
    "SIM115": "file = open('x')\n",
    "S302": "import marshal\nmarshal.loads(b'')\n",
}


@pytest.mark.parametrize("file", ["megatron_ssft/x.py", "megatron_ssft/parallel/x.py"])
@pytest.mark.parametrize("code", LINT_ERRORS)
def test_lint_error_is_found(code, file):
    assert code in codes(file, LINT_ERRORS[code])


# -- who may use what ------------------------------------------------------------------------------------------------

SPELLINGS = [
    "import torch.distributed as dist",
    "import torch.distributed",
    "from torch import distributed",
    "from torch import distributed as d",
    "from torch.distributed import all_reduce",
    "from torch.distributed.checkpoint import FileSystemReader",
    "import torch\nrank = torch.distributed.get_rank()",
    "import torch as t\ndef f():\n    return t.distributed.get_rank()",
    "def f():\n    import torch.distributed",
    "import megatron.core",
    "import megatron",
    "from megatron import core",
    "from megatron.core import parallel_state",
    "class A:\n    def f(self):\n        from megatron.core.models.gpt import GPTModel",
]


@pytest.mark.parametrize("source", SPELLINGS)
@pytest.mark.parametrize(
    "file",
    ["megatron_ssft/training/x.py", "megatron_ssft/data/x.py", "megatron_ssft/cli/entry.py", "tools/convert.py"],
)
def test_megatron_and_torch_distributed_are_found_in_every_spelling(file, source):
    assert "TID251" in codes(file, source)


def test_entry_point_is_looked_at_too():
    assert "TID251" in codes("pretrain_ssft.py", "import torch.distributed as dist")


@pytest.mark.parametrize("source", SPELLINGS)
def test_parallel_may_use_them(source):
    assert "TID251" not in codes("megatron_ssft/parallel/x.py", source)
    assert "TID251" not in codes("megatron_ssft/parallel/model/x.py", source)


@pytest.mark.parametrize("source", ["import pretrain_ssft", "from tools.demo import main", "from tools import demo"])
@pytest.mark.parametrize("file", ["megatron_ssft/training/trainer.py", "megatron_ssft/parallel/x.py"])
def test_import_of_a_program_is_found(file, source):
    assert "TID251" in codes(file, source)


DANGERS = {
    "import pickle": "TID251",
    "import pickle as p": "TID251",
    "from pickle import loads": "TID251",
    "import _pickle": "TID251",
    "import cPickle": "TID251",
    "import cloudpickle": "TID251",
    "import marshal": "TID251",
    "import shelve": "TID251",
    "def f():\n    import dill": "TID251",
    "import joblib": "TID251",
    "eval('1')": "S307",
    "exec('x = 1')": "S102",
    "import builtins\nbuiltins.exec('1')": "S102",
}


@pytest.mark.parametrize("source", DANGERS)
@pytest.mark.parametrize("file", ["megatron_ssft/parallel/x.py", "megatron_ssft/errors.py", "tools/x.py"])
def test_code_that_runs_data_is_found(file, source):
    assert DANGERS[source] in codes(file, source)


def test_only_the_pickle_scan_may_unpickle():
    scan = "megatron_ssft/parallel/checkpoint/pickle_scan.py"
    assert "TID251" not in codes(scan, "import pickle")
    assert "S301" in codes(scan, "import pickle\npickle.loads(b'')")
    assert "S307" in codes(scan, "eval('1')")
    assert "TID251" in codes("megatron_ssft/data/checkpoint/pickle_scan.py", "import pickle")


def test_only_the_inside_of_the_sandbox_may_execute():
    assert "S102" not in codes("megatron_ssft/scoring/sandbox/inside/x.py", "exec('1')")
    assert "TID251" in codes("megatron_ssft/scoring/sandbox/inside/x.py", "import pickle")
    assert "S102" in codes("megatron_ssft/scoring/sandbox/insideer.py", "exec('1')")


HARMLESS = [
    "import torch\nmodel.eval()\ntorch.utils.data",
    "import ast\nast.literal_eval('1')",
    "from megatron_ssft import __version__",
    "from megatron_ssft.errors import UserError\nfrom megatron_ssft.data.jsonl import read_examples",
    "distributed = 1\nname = 'torch.distributed'",
]


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_allowed_passes(source):
    assert not codes("megatron_ssft/training/x.py", source) & {"TID251", "S102", "S301", "S302", "S307"}


# -- the other tools -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_type_error_is_found(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folder = tmp_path / "megatron_ssft"
    folder.mkdir()
    (folder / "__init__.py").touch()

    def check(source):
        (folder / "x.py").write_text(source)
        # Its cache takes a file of the same size, written within the same second, for the old one.
        return run(sys.executable, "-m", "mypy", "--no-incremental", "megatron_ssft", cwd=tmp_path)

    assert check("def f(x: int) -> int:\n    return x\n").returncode == 0
    for source, code in {
        "def f(x: int) -> str:\n    return x\n": "return-value",
        "def f(x=None):\n    return 1 + ''\n": "operator",  # bodies without annotations are checked too
        "x: int = 1  # type: ignore[assignment]\n": "unused-ignore",
        "from typing import cast\n\n\ndef f(x: int) -> int:\n    return cast(int, x)\n": "redundant-cast",
        "import no_such_module\n": "import-not-found",
    }.items():
        done = check(source)
        assert done.returncode == 1 and f"[{code}]" in done.stdout, done.stdout


def test_shell_error_is_found(tmp_path):
    script = tmp_path / "x.sh"
    check = [tool("shellcheck"), "--shell=bash", "--severity=warning", script]
    script.write_text('#!/usr/bin/env bash\necho "$1"\n')
    assert run("bash", "-n", script).returncode == 0 and run(*check).returncode == 0
    script.write_text("#!/usr/bin/env bash\nunused=1\n")
    assert run("bash", "-n", script).returncode == 0 and run(*check).returncode == 1
    script.write_text("#!/usr/bin/env bash\nif true; then\n")
    assert run("bash", "-n", script).returncode != 0


def test_error_in_a_dockerfile_is_found(tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text("FROM scratch:1\nCOPY a /b/\n")
    assert run(tool("hadolint"), file).returncode == 0
    file.write_text("FROM scratch\nMAINTAINER nobody\n")
    assert run(tool("hadolint"), file).returncode == 1
