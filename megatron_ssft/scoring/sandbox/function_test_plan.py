"""Reads the tests of a function: what of them runs, and whether that can tell a right solution from a wrong one.

Tests are asserts in lines of their own, a `check(candidate)` as HumanEval has it, functions and classes as pytest
collects them, or unittest's test cases. What none of these reaches never runs. Tests are refused if nothing that runs
calls the function, or nothing that runs can fail; so they are if no solution could pass them in the sandbox.
"""

from __future__ import annotations

import ast
import functools
import symtable
from collections.abc import Iterable, Iterator

from megatron_ssft.scoring.sandbox.function_test_needs import (
    Imports,
    UnusableTests,
    check_names,
    check_replacements,
    looks_at_output,
)
from megatron_ssft.scoring.sandbox.inside.specification import TestPlan
from megatron_ssft.scoring.sandbox.long_integers import any_integer_length

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_FAILS = ("assert", "fail", "raise", "exit", "expect", "verify")
"""Parts of the names of functions that tests fail by, like assertEqual or numpy's assert_allclose."""
_BY_NAME = {"eval", "exec", "globals", "locals", "vars", "getattr", "__import__"}
"""Functions that may call others which are not named in the text."""
_HOOKS = (
    *("setUpModule", "tearDownModule", "load_tests", "setup_module", "teardown_module"),
    *("setup_function", "teardown_function"),
)
_NEEDS_FOLDERS = {"tmp_path", "tmp_path_factory", "tmpdir", "tmpdir_factory", "pytester", "testdir"}
"""pytest's fixtures that make folders, which nothing in the sandbox can."""


@functools.lru_cache(maxsize=256)
def read_test_set(code: str, entry_point: str) -> TestPlan:
    """Plan what runs. Raises UnusableTests for tests that prove nothing, or that no solution could pass."""
    try:
        with any_integer_length():
            tree = ast.parse(code)
            table = symtable.symtable(code, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableTests(f"'code' of 'tests' is not valid Python: {error}") from error
    name = entry_point.rpartition(".")[2]
    imports = Imports(tree, name)
    imports.check()
    check_names(tree, table, name)
    check_replacements(tree)
    tests = _Tests(tree, name, imports)
    plan = tests.plan()
    tests.check_proof(plan, table)
    return plan


class _Tests:
    """The tests' tree, split into what runs at once and what must be called."""

    def __init__(self, tree: ast.Module, name: str, imports: Imports) -> None:
        self._name = name
        self._tree = tree
        self._imports = imports
        self._definitions: dict[str, list[_Definition]] = {}
        self._executed = list(_executed(tree.body, self._definitions))
        """Nodes that run when the module does."""
        self._names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]

    def plan(self) -> TestPlan:
        """List what to call. Raises UnusableTests for test functions that nothing here can call."""
        functions: list[tuple[str, bool]] = []
        tests_of_pytest = False
        for name, definitions in self._definitions.items():
            node = definitions[-1]
            is_called = self._is_referenced(name)
            if isinstance(node, ast.ClassDef):
                tests_of_pytest |= name.startswith("Test") or _has_tests(node)
                self._check_class(node, is_called)
            elif name.startswith("test"):
                tests_of_pytest = True
                if (takes := self._takes_candidate(node, is_called)) is not None:
                    functions.append((name, takes))
            elif name == "check" and not is_called:
                functions.append((name, bool(self._arguments_of_check(node))))
        is_pytest = self._imports.has("pytest") and tests_of_pytest
        return {
            "modules": self._imports.modules,
            "functions": [] if is_pytest else functions,
            "unittest": self._imports.has("unittest"),
            "pytest": is_pytest,
            "output": looks_at_output(self._tree),
        }

    def _is_referenced(self, name: str) -> bool:
        """Whether the text uses a definition's name outside of the definition itself."""
        own = {id(node) for definition in self._definitions[name] for node in ast.walk(definition)}
        return any(isinstance(node, ast.Name) and node.id == name and id(node) not in own for node in self._names)

    def _takes_candidate(self, node: _Function, is_called: bool) -> bool | None:
        """Whether a test function takes the function under test; None for a helper, which the tests call themselves."""
        if any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in _own_nodes(node)):
            raise UnusableTests(f"the test {node.name!r} is a generator, which no runner runs; use asserts alone")
        needed = _required(node)
        if folders := sorted(_NEEDS_FOLDERS & set(needed)):
            raise UnusableTests(f"the test {node.name!r} needs {folders[0]!r}, but there are no folders in the sandbox")
        if self._imports.has("pytest") or not needed or node.decorator_list:
            return False
        if is_called:
            return None
        if needed in (["candidate"], [self._name]):
            return True
        raise UnusableTests(f"the test {node.name!r} takes {needed[0]!r}, and nothing gives it; call it, or use pytest")

    @staticmethod
    def _arguments_of_check(node: _Function) -> list[str]:
        needed = _required(node)
        if len(needed) > 1:
            raise UnusableTests("the function 'check' takes more than the function under test; call it in 'code'")
        return needed or [argument.arg for argument in node.args.args[:1]]

    def _check_class(self, node: ast.ClassDef, is_called: bool) -> None:
        """Raises UnusableTests for a class of tests that no runner can run."""
        methods = [part for part in node.body if isinstance(part, _Function)]
        tests = [method for method in methods if method.name.startswith("test")]
        if not node.name.startswith("Test") or not tests:
            return
        if any(method.name == "__init__" for method in methods) and not is_called and not node.bases:
            raise UnusableTests(f"the class {node.name!r} has an __init__, so no runner takes it for tests")
        for method in tests:
            is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in method.decorator_list)
            needed = _required(method)[0 if is_static else 1 :]
            if folders := sorted(_NEEDS_FOLDERS & set(needed)):
                raise UnusableTests(f"{node.name}.{method.name} needs {folders[0]!r}; the sandbox has no folders")
            if needed and not self._imports.has("pytest") and (is_static or not method.decorator_list):
                raise UnusableTests(f"{node.name}.{method.name} takes {needed[0]!r}, and nothing gives it; use pytest")

    def check_proof(self, plan: TestPlan, table: symtable.SymbolTable) -> None:
        """Raises UnusableTests unless something that runs calls the function, and something that runs can fail."""
        reached = self._reached([name for name, _ in plan["functions"]])
        if any(isinstance(node, (ast.AsyncFunctionDef, ast.Await)) for node in reached):
            raise UnusableTests("the tests are asynchronous, and there are no event loops in the sandbox")
        if any(isinstance(node, ast.Attribute) and node.attr == "_exit" for node in reached):
            raise UnusableTests("the tests end their process by os._exit before they can be counted; use sys.exit")
        symbols = table.get_symbols()
        own = {symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported()}
        targets = {"candidate"} | ({self._name} - own) | self._imports.aliases | _BY_NAME
        calls = any(takes for _, takes in plan["functions"]) or any(
            (isinstance(node, ast.Name) and node.id in targets)
            or (isinstance(node, ast.Attribute) and node.attr == self._name)
            for node in reached
        )
        if not calls:
            idle = sorted(set(self._definitions) - {node.name for node in reached if isinstance(node, _Definition)})
            reason = f"; {idle[0]!r} is defined and never called" if idle else ""
            raise UnusableTests(f"'code' of 'tests' tests nothing: it never calls {self._name!r}{reason}")
        returned = [node for name, _ in plan["functions"] for node in _own_nodes(self._definitions[name][-1])]
        silent = [node for node in reached if isinstance(node, ast.Try) and _swallows(node)]
        idle_parts = [*(statement for node in silent for statement in node.body), *filter(_may_fail, reached)]
        dropped = {id(part) for idle_part in idle_parts for part in ast.walk(idle_part)}
        if any(id(node) not in dropped and _can_fail(node) for node in reached):
            return
        if silent:
            raise UnusableTests(f"'code' of 'tests' drops its failures, which line {silent[0].lineno} catches")
        if not any(isinstance(node, ast.Return) and node.value for node in returned):
            raise UnusableTests("'code' of 'tests' tests nothing: it has no assert, and nothing else that can fail")

    def _reached(self, called: Iterable[str]) -> list[ast.AST]:
        """All nodes that may run: those of the module, and of what it names, and of what runners call."""
        roots = {*called, *_HOOKS}
        for name, definitions in self._definitions.items():
            node = definitions[-1]
            runs = (
                _has_tests(node) if isinstance(node, ast.ClassDef) else name.startswith("test") or node.decorator_list
            )
            if runs:
                roots.add(name)
        nodes, waiting, seen = list(self._executed), set(roots), set()
        waiting |= {node.id for node in nodes if isinstance(node, ast.Name)}
        while waiting:
            name = waiting.pop()
            seen.add(name)
            for definition in self._definitions.get(name, ()):
                inner = list(ast.walk(definition))
                nodes += inner
                waiting |= {node.id for node in inner if isinstance(node, ast.Name)} - seen
        return nodes


def _executed(body: Iterable[ast.AST], definitions: dict[str, list[_Definition]]) -> Iterator[ast.AST]:
    """Yield the nodes that run with the module, and collect the functions and classes that it defines."""
    stack = list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, _Function):
            definitions.setdefault(node.name, []).append(node)
            stack += [*node.decorator_list, node.args]
        elif isinstance(node, ast.ClassDef):
            definitions.setdefault(node.name, []).append(node)
            stack += [*node.bases, *node.keywords, *node.decorator_list]
            stack += [part for part in node.body if not isinstance(part, _Definition)]
        else:
            yield node
            stack += ast.iter_child_nodes(node)


def _own_nodes(definition: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions and classes inside it."""
    stack = list(ast.iter_child_nodes(definition))
    while stack:
        node = stack.pop()
        if not isinstance(node, _Definition | ast.Lambda):
            yield node
            stack += ast.iter_child_nodes(node)


def _required(node: _Function) -> list[str]:
    """Arguments without a default."""
    positional = [*node.args.posonlyargs, *node.args.args]
    positional = positional[: len(positional) - len(node.args.defaults)]
    keywords = [arg for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults) if default is None]
    return [argument.arg for argument in [*positional, *keywords]]


def _has_tests(node: ast.ClassDef) -> bool:
    """Whether a runner may find tests in the class: it is called Test..., or inherits and has a test method."""
    has_methods = any(isinstance(part, _Function) and part.name.startswith(("test", "runTest")) for part in node.body)
    return node.name.startswith("Test") or (bool(node.bases) and has_methods)


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return any(part in name.lower() for part in _FAILS)
    return isinstance(node, (ast.Assert, ast.Raise))


def _may_fail(node: ast.AST) -> bool:
    """Whether it is a test that pytest lets fail."""
    return isinstance(node, _Definition) and any("xfail" in ast.unparse(d) for d in node.decorator_list)


def _swallows(node: ast.Try) -> bool:
    """Whether asserts fail inside `node` without any consequence but words."""
    if not any(isinstance(part, ast.Assert) for statement in node.body for part in ast.walk(statement)):
        return False
    for handler in node.handlers:
        names = {part.id for part in ast.walk(handler.type) if isinstance(part, ast.Name)} if handler.type else set()
        if handler.type is None or names & {"AssertionError", "Exception", "BaseException"}:
            return all(_is_idle(statement) for statement in handler.body)
    return False


def _is_idle(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return getattr(statement.value.func, "id", "") == "print"
    return isinstance(statement, (ast.Pass, ast.Continue, ast.Break)) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
