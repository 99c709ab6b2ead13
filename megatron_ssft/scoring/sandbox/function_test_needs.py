"""What the tests of a function need beside it: modules, names, and what they replace in their own process.

Whatever the sandbox does not have, no solution can make up for; such tests are refused before anything is judged.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.machinery
import symtable
import sys
import sysconfig
from collections.abc import Iterator

SOLUTION_MODULE = "solution"
"""Tests can import the function from a module of this name."""
_OUTPUT = ("stdout", "capsys", "capfd")
"""Parts of names by which tests look at what the function prints."""


class UnusableTests(ValueError):
    """The tests cannot tell right from wrong; the text says why, without the place."""


class Imports:
    """The imports of some tests, and what the tests use of them."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        """`name`: the function under test."""
        self._name = name
        self._nodes = list(ast.walk(tree))
        self._uses = list(self._find_uses())
        found = [module for _, module, used in self._uses if used == {name} and not _is_installed(module)]
        self.modules = [SOLUTION_MODULE, *sorted({module for module in found if "." not in module} - {SOLUTION_MODULE})]
        """Names under which the tests import the solution: modules that are not here, used for the function alone."""
        self.aliases = {alias.asname for alias in self._names_of_solution() if alias.asname}
        """Other names that the tests give the function."""

    def _find_uses(self) -> Iterator[tuple[ast.Import | ast.ImportFrom, str, set[str]]]:
        """Yield each import, its module and the names that the tests use of it."""
        attributes: dict[str, set[str]] = {}
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes.setdefault(node.value.id, set()).add(node.attr)
        for node in self._nodes:
            if isinstance(node, ast.ImportFrom):
                yield node, "." * node.level + (node.module or ""), {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name, attributes.get(alias.asname or alias.name, set())

    def _names_of_solution(self) -> Iterator[ast.alias]:
        for node, module, _ in self._uses:
            if isinstance(node, ast.ImportFrom) and module in self.modules:
                yield from node.names

    def has(self, root: str) -> bool:
        """Whether the tests import this module or one in it."""
        return any(module.partition(".")[0] == root for _, module, _ in self._uses)

    def check(self) -> None:
        """Raises UnusableTests for a module, or a name in the solution, that programs here do not have."""
        guarded = {id(part) for node in self._nodes if isinstance(node, ast.Try) for part in ast.walk(node)}
        for node, module, used in self._uses:
            root = module.partition(".")[0]
            if root == "doctest":
                raise UnusableTests("'code' of 'tests' has doctests, which are not run; write them as asserts")
            if module.startswith("."):
                raise UnusableTests(f"the tests import from a package of their own, {module!r}; import from 'solution'")
            if module in self.modules:
                if more := sorted(used - {self._name, "candidate", "*"}):
                    raise UnusableTests(_more_than_the_function(more[0], self._name))
            elif id(node) not in guarded and not _is_installed(root):
                raise UnusableTests(f"the tests import {root!r}, which is not installed here")


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a program in the sandbox finds the module."""
    root = module.partition(".")[0]
    if root in sys.builtin_module_names or root in sys.stdlib_module_names or root == "__future__":
        return True
    folders = sorted({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})
    return importlib.machinery.PathFinder.find_spec(root, folders) is not None


def check_names(tree: ast.Module, table: symtable.SymbolTable, name: str) -> None:
    """Refuse tests that use more of the solution than the function under test. Raises UnusableTests."""
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)):
        return
    names = {name, "candidate", "__name__", "__file__", "__doc__", *dir(builtins)}
    names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    tables = [table]
    while tables:
        scope = tables.pop()
        tables += scope.get_children()
        names |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned()}
        used |= {s.get_name() for s in scope.get_symbols() if s.is_referenced() and s.is_global()}
    if missing := sorted(used - names):
        raise UnusableTests(_more_than_the_function(missing[0], name))


def _more_than_the_function(used: str, name: str) -> str:
    return (
        f"the tests use {used!r}, which they do not define; only {name!r} (also as 'candidate') is "
        "taken from the solution, put helpers into 'code' of 'tests'"
    )


def looks_at_output(tree: ast.Module) -> bool:
    """Whether the tests may look at what the function prints."""
    words = (getattr(node, field, None) for node in ast.walk(tree) for field in ("id", "attr", "arg", "value"))
    return any(isinstance(word, str) and part in word for word in words for part in _OUTPUT)


def check_replacements(tree: ast.Module) -> None:
    """Refuse tests that replace something for the function, which does not see it. Raises UnusableTests."""
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Assign):
            targets = [ast.unparse(t) for t in node.targets if isinstance(t, ast.Attribute)]
            targets = [target for target in targets if target in ("sys.stdin", "builtins.input")]
        elif isinstance(node, ast.Call) and _is_patch(ast.unparse(node.func)):
            targets = [ast.unparse(argument) for argument in node.args[:2]]
            targets = [] if any("stdout" in target for target in targets) else targets[:1]
        if targets:
            raise UnusableTests(
                f"the tests replace {targets[0]}, but the function runs in a process of its own and does not see it"
            )


def _is_patch(function: str) -> bool:
    name = function.removeprefix("unittest.").removeprefix("mock.")
    return name in ("patch", "patch.object", "patch.dict") or function in ("monkeypatch.setattr", "monkeypatch.setenv")
