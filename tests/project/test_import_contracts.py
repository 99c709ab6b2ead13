"""The import contracts of pyproject.toml are kept, and breaking each is seen."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib

import grimp
import pytest

from tests.helpers.paths import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
FOLDERS = [name.strip() for layer in SETTINGS["contracts"][0]["layers"] for name in layer.split("|")]


def check_contracts(root):
    """(whether all contracts are kept, what was printed, on one line) for the package that stands in `root`."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", program, "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0, " ".join(done.stdout.split())


@pytest.fixture
def small(tmp_path):
    """A project with the same settings, whose folders are empty."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("", *FOLDERS):
        (tmp_path / "megatron_ssft" / folder).mkdir()
        (tmp_path / "megatron_ssft" / folder / "__init__.py").touch()
    return tmp_path


def plant(root, file, source=""):
    """Write a file of the package, below folders that are packages."""
    path = root / "megatron_ssft" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in path.relative_to(root).parents[:-1]:
        (root / folder / "__init__.py").touch()
    path.write_text(source)


def test_the_project_keeps_them():
    is_kept, printed = check_contracts(ROOT)
    assert is_kept, printed


def test_every_file_is_looked_at():
    graph = grimp.build_graph("megatron_ssft", cache_dir=None)
    files = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "megatron_ssft").rglob("*.py")}
    names = {".".join(file.parts).removesuffix(".__init__") for file in files}
    assert graph.modules == names
    assert {"megatron_ssft.training.trainer", "megatron_ssft.parallel.engine"} <= names


def test_empty_folders_keep_them(small):
    is_kept, printed = check_contracts(small)
    assert is_kept, printed


UPWARD = [
    ("config/model.py", "from megatron_ssft.data.jsonl import read_examples", "data.jsonl"),
    ("records/rows.py", "def f():\n    import megatron_ssft.training.trainer", "training.trainer"),
    ("data/cache.py", "from megatron_ssft.parallel import engine", "parallel.engine"),
    ("data/__init__.py", "from .. import training", "training"),
    ("hf/assets.py", "from megatron_ssft import parallel", "parallel"),
    ("layouts/packed.py", "from ..parallel.engine import Engine", "parallel.engine"),
    ("matching/assignment.py", "if True:\n    from megatron_ssft.training import trainer as t", "training.trainer"),
    ("scheduling/deep/er.py", "from ...training.setup import prepare_data", "training.setup"),
    ("parallel/engine.py", "from megatron_ssft.training.trainer import Trainer", "training.trainer"),
    (
        "formats/rows.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_ssft.report import runs",
        "report.runs",
    ),
]


@pytest.fixture(scope="module")
def upward_imports(tmp_path_factory):
    """What is said about a project that holds all upward imports at once."""
    root = tmp_path_factory.mktemp("upward")
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in FOLDERS:
        plant(root, f"{folder}/__init__.py")
    for file in ("data/jsonl", "training/trainer", "training/setup", "parallel/engine", "report/runs"):
        plant(root, f"{file}.py")
    for file, source, _ in UPWARD:
        plant(root, file, source)
    is_kept, printed = check_contracts(root)
    assert not is_kept
    return printed


@pytest.mark.parametrize(("file", "source", "imported"), UPWARD)
def test_upward_import_is_found(upward_imports, file, source, imported):
    importer = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert "Floors: imports run downward only BROKEN" in upward_imports
    assert f"megatron_ssft.{importer} -> megatron_ssft.{imported} (l." in upward_imports


def test_folder_outside_all_floors_is_found(small):
    plant(small, "utils/misc.py")
    is_kept, printed = check_contracts(small)
    assert not is_kept and "megatron_ssft.utils" in printed


def test_import_in_the_package_s_own_init_is_found(small):
    plant(small, "training/trainer.py")
    plant(small, "__init__.py", "from megatron_ssft.training import trainer")
    is_kept, printed = check_contracts(small)
    assert not is_kept and "The package itself imports nothing of its own BROKEN" in printed


CYCLES = {
    "between two files": {
        "data/cache.py": "from megatron_ssft.data import jsonl",
        "data/jsonl.py": "from megatron_ssft.data import cache",
    },
    "between two folders": {
        "parallel/model/gpt.py": "from megatron_ssft.parallel.attention import kernels",
        "parallel/attention/kernels.py": "",
        "parallel/attention/groups.py": "from megatron_ssft.parallel.model import norm",
        "parallel/model/norm.py": "",
    },
    "for the type checker alone": {
        "training/trainer.py": "from megatron_ssft.training import steps",
        "training/steps.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from megatron_ssft.training.trainer import Trainer",
    },
    "in a function": {
        "hf/assets.py": "from megatron_ssft.hf import families",
        "hf/families.py": "def f():\n    from megatron_ssft.hf.assets import g",
    },
    "of three files": {
        "report/a.py": "from megatron_ssft.report import b",
        "report/b.py": "from .c import x",
        "report/c.py": "import megatron_ssft.report.a",
    },
}


@pytest.mark.parametrize("cycle", CYCLES)
def test_cycle_is_found(small, cycle):
    for file, source in CYCLES[cycle].items():
        plant(small, file, source)
    is_kept, printed = check_contracts(small)
    folder = next(iter(CYCLES[cycle])).split("/")[0]
    assert not is_kept and "Floors: imports run downward only KEPT" in printed
    assert f"No cycles are allowed in megatron_ssft.{folder}." in printed


def init_cycles(graph):
    """(package, module of it) that import each other: the contract on siblings does not see these."""
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    inner = [(a, b) for a in imports for b in imports[a] if b.startswith(f"{a}.")]
    return [(a, b) for a, b in inner if graph.chain_exists(importer=b, imported=a)]


def test_no_init_and_its_modules_import_each_other():
    assert init_cycles(grimp.build_graph("megatron_ssft", cache_dir=None)) == []
    graph = grimp.build_graph("megatron_ssft", cache_dir=None)
    graph.add_import(importer="megatron_ssft.config.data", imported="megatron_ssft.config")
    # programs.py imports data.py, so both lead back to the __init__ that imports them
    assert set(init_cycles(graph)) == {
        ("megatron_ssft.config", "megatron_ssft.config.data"),
        ("megatron_ssft.config", "megatron_ssft.config.programs"),
    }
