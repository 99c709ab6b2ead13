"""The layering of docs/architecture.md, read off the source: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FOLDER_LAYERS = {
    "cli": 1,
    "formats": 1,
    "rounds": 1,
    "report": 1,
    "demo": 1,
    "training": 3,
    "parallel": 2,
    "evaluation": 1,
    "scoring": 1,
    "generation": 1,
    "objectives": 1,
    "scheduling": 1,
    "layouts": 1,
    "matching": 1,
    "datasets": 1,
    "data": 1,
    "tokenizers": 1,
    "hf": 1,
}
MODULES_OF_LAYER_0 = {"__init__", "config", "records", "errors"}
HEAVY = ("megatron", "torch.distributed")
"""For layer 2 only. `megatron` is the namespace of megatron-core; the project's own package is megatron_ssft."""
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
MAY_UNPICKLE = "megatron_ssft.parallel.checkpoint.pickle_scan"
MAY_EXECUTE = "megatron_ssft.scoring.sandbox.inside"
"""Runs generated programs, behind walls of its own; nothing else may run text as code."""


# -- the checker -----------------------------------------------------------------------------------------------------


def layer_of(module: str) -> int | None:
    """Layer of a dotted module of the project; None for everything else. Raises ValueError without a layer."""
    parts = module.split(".")
    if parts[0] in ("pretrain_ssft", "tools"):
        return 4
    if parts[0] != "megatron_ssft":
        return None
    if len(parts) == 1 or parts[1] in MODULES_OF_LAYER_0:
        return 0
    if parts[1] not in FOLDER_LAYERS:
        raise ValueError(f"{module} stands in no layer")
    return FOLDER_LAYERS[parts[1]]


def module_name(root: Path, file: Path) -> str:
    """Dotted name of a file below `root`, `__init__` left out."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def check_tree(root: Path) -> list[str]:
    """One line a violation in the project that stands in `root`."""
    files = [*sorted((root / "megatron_ssft").rglob("*.py")), *sorted((root / "tools").rglob("*.py"))]
    return [line for file in [*files, root / "pretrain_ssft.py"] if file.is_file() for line in check_file(root, file)]


def check_file(root: Path, file: Path) -> list[str]:
    """One line a violation in one file."""
    module = module_name(root, file)
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    where = file.relative_to(root)
    try:
        mine = layer_of(module)
    except ValueError as error:
        return [f"{where}: {error}"]
    reader = _Reader(module, is_package=file.name == "__init__.py")
    reader.visit(tree)
    found = list(reader.misdeeds)
    for line, name in reader.uses:
        found += [(line, reason) for reason in _reasons_against(module, mine, name, known=root)]
    return [f"{where}:{line}: {reason}" for line, reason in sorted(set(found))]


def _reasons_against(module: str, mine: int, name: str, known: Path) -> list[str]:
    if any(_inside(name, heavy) for heavy in HEAVY) and mine != 2:
        return [f"uses {name}, which is for megatron_ssft/parallel"]
    if any(_inside(name, pickle) for pickle in PICKLES) and module != MAY_UNPICKLE:
        return [f"uses {name}"]
    try:
        theirs = layer_of(name)
    except ValueError:  # an attribute of the package, such as __version__, or a folder that does not exist
        parts = name.split(".")
        exists = (known / parts[0] / parts[1]).exists() or (known / parts[0] / f"{parts[1]}.py").exists()
        return [f"imports {name}, which stands in no layer"] if exists else []
    if theirs is not None and theirs > mine:
        return [f"layer {mine} imports {name} of layer {theirs}"]
    return []


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


class _Reader(ast.NodeVisitor):
    """Collects (line, dotted name) of everything imported or reached through an imported name, and misdeeds."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.may_execute = _inside(module, MAY_EXECUTE)
        self.uses: list[tuple[int, str]] = []
        self.misdeeds: list[tuple[int, str]] = []
        self.aliases: dict[str, str] = {}  # local name -> dotted name

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.uses.append((node.lineno, alias.name))
            top = alias.name.split(".")[0]
            self.aliases[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        self.uses.append((node.lineno, base))
        for alias in node.names:
            name = f"{base}.{alias.name}"
            self.uses.append((node.lineno, name))
            self.aliases[alias.asname or alias.name] = name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`torch.distributed.x` needs no import of torch.distributed."""
        name = self._dotted(node)
        if name is not None:
            self.uses.append((node.lineno, name))
            if name in ("builtins.eval", "builtins.exec", "builtins.__import__") and not self.may_execute:
                self.misdeeds.append((node.lineno, f"uses {name}"))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in ("eval", "exec") and not self.may_execute:
            self.misdeeds.append((node.lineno, f"uses {node.id}"))

    def visit_Call(self, node: ast.Call) -> None:
        called = self._dotted(node.func) or ""
        first = node.args[0] if node.args else None
        if called in ("importlib.import_module", "__import__") and isinstance(first, ast.Constant):
            self.uses.append((node.lineno, str(first.value)))
        if called == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            base = self._dotted(first)
            self.uses += [(node.lineno, f"{base}.{node.args[1].value}")] if base else []
        for keyword in node.keywords:
            self._check_setting(keyword.arg, keyword.value)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values):
            if isinstance(key, ast.Constant):
                self._check_setting(key.value, value)
        self.generic_visit(node)

    def _check_setting(self, name: object, value: ast.expr) -> None:
        is_false = isinstance(value, ast.Constant) and value.value is False
        if (name in ("trust_remote_code", "allow_pickle") and not is_false) or (name == "weights_only" and is_false):
            self.misdeeds.append((value.lineno, f"sets {name} to {ast.unparse(value)}"))

    def _dotted(self, node: ast.AST | None) -> str | None:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None


# -- the project -----------------------------------------------------------------------------------------------------


def test_project_keeps_its_layers():
    assert check_tree(ROOT) == []


def test_every_file_is_looked_at():
    names = {module_name(ROOT, file) for file in (ROOT / "megatron_ssft").rglob("*.py")}
    assert {"megatron_ssft", "megatron_ssft.training.trainer", "megatron_ssft.parallel.engine"} <= names
    assert {layer_of(name) for name in names} == {0, 1, 2, 3}


# -- the checker finds what it is for --------------------------------------------------------------------------------


def plant(root: Path, file: str, source: str) -> list[str]:
    """Violations of a project that is nothing but this file."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return check_tree(root)


UPWARD = [
    ("megatron_ssft/config/model.py", "from megatron_ssft.data.jsonl import read_examples"),
    ("megatron_ssft/records.py", "def f():\n    import megatron_ssft.training.trainer"),
    ("megatron_ssft/data/cache.py", "from megatron_ssft.parallel import engine"),
    ("megatron_ssft/data/cache.py", "from megatron_ssft import parallel"),
    ("megatron_ssft/data/cache.py", "from ..parallel.engine import Engine"),
    ("megatron_ssft/data/__init__.py", "from .. import training"),
    ("megatron_ssft/matching/assignment.py", "if True:\n    from megatron_ssft.training import trainer as t"),
    ("megatron_ssft/scheduling/deep/er.py", "from ...training.setup import prepare_data"),
    ("megatron_ssft/parallel/engine.py", "from megatron_ssft.training.trainer import Trainer"),
    ("megatron_ssft/training/trainer.py", "import pretrain_ssft"),
    ("megatron_ssft/training/trainer.py", "from tools.demo import main"),
    (
        "megatron_ssft/report/read/runs.py",
        "import importlib\nimportlib.import_module('megatron_ssft.training.trainer')",
    ),
    ("megatron_ssft/data/cache.py", "import megatron_ssft\nmegatron_ssft.parallel.engine.Engine"),
]


@pytest.mark.parametrize(("file", "source"), UPWARD)
def test_upward_import_is_found(tmp_path, file, source):
    assert any("of layer" in line and line.startswith(file) for line in plant(tmp_path, file, source))


SPELLINGS = [
    "import torch.distributed as dist",
    "import torch.distributed",
    "from torch import distributed",
    "from torch import distributed as d",
    "from torch.distributed import all_reduce",
    "from torch.distributed.checkpoint import FileSystemReader",
    "import torch\nrank = torch.distributed.get_rank()",
    "import torch as t\ndef f():\n    return t.distributed.get_rank()",
    "import torch\ngetattr(torch, 'distributed')",
    "def f():\n    import torch.distributed",
    "import megatron.core",
    "import megatron",
    "from megatron import core",
    "from megatron.core import parallel_state",
    "class A:\n    def f(self):\n        from megatron.core.models.gpt import GPTModel",
    "__import__('megatron.core')",
    "from importlib import import_module\nimport_module('torch.distributed')",
]


@pytest.mark.parametrize("source", SPELLINGS)
@pytest.mark.parametrize(
    "file", ["megatron_ssft/training/x.py", "megatron_ssft/data/x.py", "megatron_ssft/cli/entry.py"]
)
def test_megatron_and_torch_distributed_are_found_in_every_spelling(tmp_path, file, source):
    assert any("is for megatron_ssft/parallel" in line for line in plant(tmp_path, file, source))


@pytest.mark.parametrize("file", ["pretrain_ssft.py", "tools/convert.py"])
def test_entry_points_are_looked_at_too(tmp_path, file):
    assert plant(tmp_path, file, "import torch.distributed as dist") != []


@pytest.mark.parametrize("source", SPELLINGS)
def test_layer_2_may_use_them(tmp_path, source):
    assert plant(tmp_path, "megatron_ssft/parallel/x.py", source) == []


DANGERS = [
    "import pickle",
    "import pickle as p",
    "from pickle import loads",
    "import _pickle",
    "def f():\n    import dill",
    "import joblib",
    "eval('1')",
    "exec('x = 1')",
    "f = eval",
    "import builtins\nbuiltins.exec('1')",
    "f(trust_remote_code=True)",
    "f(trust_remote_code=config.trust)",
    "options = {'trust_remote_code': True}",
    "torch.load(path, weights_only=False)",
    "numpy.load(path, allow_pickle=True)",
]


@pytest.mark.parametrize("source", DANGERS)
@pytest.mark.parametrize("file", ["megatron_ssft/parallel/x.py", "megatron_ssft/errors.py", "tools/x.py"])
def test_code_that_runs_data_is_found(tmp_path, file, source):
    assert plant(tmp_path, file, source) != []


def test_only_the_pickle_scan_may_unpickle(tmp_path):
    assert plant(tmp_path, "megatron_ssft/parallel/checkpoint/pickle_scan.py", "import pickle") == []
    assert plant(tmp_path, "megatron_ssft/parallel/checkpoint/pickle_scan.py", "eval('1')") != []


def test_only_the_jail_may_execute(tmp_path):
    assert plant(tmp_path, "megatron_ssft/scoring/sandbox/inside/x.py", "exec('1')") == []
    assert plant(tmp_path, "megatron_ssft/scoring/sandbox/inside/x.py", "import pickle") != []
    assert plant(tmp_path, "megatron_ssft/scoring/sandbox/insideer.py", "exec('1')") != []


HARMLESS = [
    "import torch\nmodel.eval()\ntorch.utils.data",
    "import ast\nast.literal_eval('1')",
    "f(trust_remote_code=False)",
    "torch.load(path, weights_only=True)",
    "load_checkpoint(engine, run, weights_only=config.finetune)",
    "from megatron_ssft import __version__",
    "from megatron_ssft.errors import UserError\nfrom megatron_ssft.data.jsonl import read_examples",
    "distributed = 1\nname = 'torch.distributed'",
]


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_allowed_passes(tmp_path, source):
    assert plant(tmp_path, "megatron_ssft/training/x.py", source) == []


def test_file_outside_all_layers_is_found(tmp_path):
    assert plant(tmp_path, "megatron_ssft/utils/misc.py", "") == [
        "megatron_ssft/utils/misc.py: megatron_ssft.utils.misc stands in no layer"
    ]
    assert any(
        "stands in no layer" in s for s in plant(tmp_path, "pretrain_ssft.py", "from megatron_ssft import utils")
    )
