"""The rules that no linter knows are kept, and breaking each is seen."""

from __future__ import annotations

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.source_rules import check_tree


def plant(root, file, source):
    """Violations of a project that is nothing but this file."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return check_tree(root)


def test_the_project_keeps_them():
    assert check_tree(ROOT) == []


HIDDEN_IMPORTS = [
    ("report/runs.py", "import importlib\nimportlib.import_module('megatron_ssft.training.trainer')"),
    ("report/runs.py", "import importlib\nimportlib.import_module('tools.demo')"),
    ("data/cache.py", "import megatron_ssft\nmegatron_ssft.parallel.engine.Engine"),
    ("parallel/x.py", "__import__('pickle')"),
    ("parallel/checkpoint/pickle_scan.py", "__import__('megatron_ssft.training')"),
]


@pytest.mark.parametrize(("file", "source"), HIDDEN_IMPORTS)
def test_import_that_hides_from_the_contracts_is_found(tmp_path, file, source):
    lines = plant(tmp_path, f"megatron_ssft/{file}", source)
    assert len(lines) >= 1 and all(line.startswith(f"megatron_ssft/{file}:") for line in lines)


SPELLINGS = [
    "import torch\ngetattr(torch, 'distributed')",
    "__import__('megatron.core')",
    "from importlib import import_module\nimport_module('torch.distributed')",
]


@pytest.mark.parametrize("source", SPELLINGS)
@pytest.mark.parametrize(
    "file",
    ["megatron_ssft/training/x.py", "megatron_ssft/data/x.py", "megatron_ssft/cli/entry.py", "tools/convert.py"],
)
def test_megatron_and_torch_distributed_are_found_by_their_names_in_strings(tmp_path, file, source):
    assert any("by its name in a string" in line for line in plant(tmp_path, file, source))


@pytest.mark.parametrize("source", SPELLINGS)
def test_parallel_may_use_them(tmp_path, source):
    assert plant(tmp_path, "megatron_ssft/parallel/x.py", source) == []


DANGERS = [
    "f = eval",
    "eval('1')",
    "exec('x = 1')",
    "import builtins\nbuiltins.exec('1')",
    "import builtins as b\nf = b.eval",
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


def test_entry_point_is_looked_at_too(tmp_path):
    assert plant(tmp_path, "pretrain_ssft.py", "f = eval") != []


def test_only_the_pickle_scan_may_unpickle(tmp_path):
    assert plant(tmp_path, "megatron_ssft/parallel/checkpoint/pickle_scan.py", "__import__('pickle')") == []
    assert plant(tmp_path, "megatron_ssft/parallel/checkpoint/pickle_scan.py", "eval('1')") != []


def test_only_the_inside_of_the_sandbox_may_execute(tmp_path):
    assert plant(tmp_path, "megatron_ssft/scoring/sandbox/inside/x.py", "f = exec") == []
    assert plant(tmp_path, "megatron_ssft/scoring/sandbox/insideer.py", "f = exec") != []
    assert plant(tmp_path, "megatron_ssft/scoring/sandbox/inside/x.py", "__import__('pickle')") != []


HARMLESS = [
    "import torch\nmodel.eval()\ntorch.utils.data",
    "import ast\nast.literal_eval('1')",
    "f(trust_remote_code=False)",
    "torch.load(path, weights_only=True)",
    "load_checkpoint(engine, run, weights_only=config.finetune)",
    "from megatron_ssft import __version__",
    "import megatron_ssft\nmegatron_ssft.__version__",
    "from megatron_ssft.errors import UserError\nfrom megatron_ssft.data.jsonl import read_examples",
    "distributed = 1\nname = 'torch.distributed'",
]


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_allowed_passes(tmp_path, source):
    assert plant(tmp_path, "megatron_ssft/training/x.py", source) == []
