"""What no file may do, where neither the linter nor the import contracts can see it."""

from __future__ import annotations

import ast
from pathlib import Path

PARALLEL_ONLY = ("megatron", "torch.distributed")
"""`megatron` is the namespace of megatron-core; the project's own package is megatron_ssft."""
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
MAY_UNPICKLE = "megatron_ssft/parallel/checkpoint/pickle_scan.py"
MAY_EXECUTE = "megatron_ssft/scoring/sandbox/inside/"
EXECUTORS = ("eval", "exec", "__import__")


def check_tree(root: Path) -> list[str]:
    """One line per violation in the project that stands in `root`."""
    files = [*sorted((root / "megatron_ssft").rglob("*.py")), *sorted((root / "tools").rglob("*.py"))]
    return [line for file in [*files, root / "pretrain_ssft.py"] if file.is_file() for line in _check_file(root, file)]


def _check_file(root: Path, file: Path) -> list[str]:
    path = file.relative_to(root).as_posix()
    reader = _Reader(path)
    reader.visit(ast.parse(file.read_text(encoding="utf-8"), str(file)))
    return [f"{path}:{line}: {violation}" for line, violation in sorted(reader.violations)]


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


class _Reader(ast.NodeVisitor):
    """Collects (line, violation)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.violations: set[tuple[int, str]] = set()
        self.aliases: dict[str, str] = {}
        """Local name -> dotted name."""

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            top = alias.name.split(".")[0]
            self.aliases[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            for alias in node.names:
                self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A module that another file imported can be reached without an import that a checker would count."""
        name = self._dotted(node)
        through_package = self._root_of(node) == "megatron_ssft"
        if name is not None and through_package and not name.startswith("megatron_ssft.__"):
            self.violations.add((node.lineno, f"reaches {name} through the package"))
        if name in [f"builtins.{executor}" for executor in EXECUTORS] and not self.path.startswith(MAY_EXECUTE):
            self.violations.add((node.lineno, f"uses {name}"))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in ("eval", "exec") and not self.path.startswith(MAY_EXECUTE):
            self.violations.add((node.lineno, f"uses {node.id}"))

    def visit_Call(self, node: ast.Call) -> None:
        called = self._dotted(node.func) or ""
        first = node.args[0] if node.args else None
        if called in ("importlib.import_module", "__import__") and isinstance(first, ast.Constant):
            self._check_hidden_import(node.lineno, str(first.value))
        if called == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            base = self._dotted(first)
            if base is not None:
                self._check_hidden_import(node.lineno, f"{base}.{node.args[1].value}")
        for keyword in node.keywords:
            self._check_setting(keyword.arg, keyword.value)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values):
            if isinstance(key, ast.Constant):
                self._check_setting(key.value, value)
        self.generic_visit(node)

    def _check_hidden_import(self, line: int, name: str) -> None:
        """An import by a literal name: allowed where the plain statement would be, except of the project's own."""
        in_parallel = self.path.startswith("megatron_ssft/parallel/")
        banned = [] if in_parallel else [*PARALLEL_ONLY]
        banned += [] if self.path == MAY_UNPICKLE else PICKLES
        banned += ["megatron_ssft", "pretrain_ssft", "tools"]
        if any(_inside(name, package) for package in banned):
            self.violations.add((line, f"imports {name} by its name in a string"))

    def _check_setting(self, name: object, value: ast.expr) -> None:
        is_false = isinstance(value, ast.Constant) and value.value is False
        if (name in ("trust_remote_code", "allow_pickle") and not is_false) or (name == "weights_only" and is_false):
            self.violations.add((value.lineno, f"sets {name} to {ast.unparse(value)}"))

    def _root_of(self, node: ast.expr) -> str | None:
        while isinstance(node, ast.Attribute):
            node = node.value
        return self.aliases.get(node.id) if isinstance(node, ast.Name) else None

    def _dotted(self, node: ast.AST | None) -> str | None:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None
