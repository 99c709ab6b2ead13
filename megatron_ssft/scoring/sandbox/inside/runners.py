"""Runs the tests of a function: the lines of their module first, then what they leave to a runner.

That is test functions and classes as pytest collects them, and unittest's test cases. A set that imports pytest is run
by pytest itself. `SystemExit` with status 0, which ends `unittest.main()`, is no failure; neither does
`exit=False` hide one: failures are taken where unittest counts them.
"""

from __future__ import annotations

import ast
import os
import sys
import types

TYPE_CHECKING = False  # typing itself would take time at the start of every program
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from megatron_ssft.scoring.sandbox.inside.specification import TestPlan

_NO_TESTS_RAN = 5
"""Exit status of unittest.main and of pytest when they find no test."""
_FILE = "test_function.py"


class Caught:
    """Keeps what a block of foreign code raises, whatever it is."""

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        self.error = error or self.error
        return True


class UnsupportedTest(Exception):
    """The tests need something that they do not have here, whatever the solution is."""


def run(source: str, names: dict[str, Any], plan: TestPlan) -> BaseException | None:
    """Run all tests with `names` in their module, and return the first failure or None."""
    for module_name in plan["modules"]:
        module = types.ModuleType(module_name)
        vars(module).update(names)
        sys.modules[module_name] = module
    tree = _bind_names(ast.parse(source), plan["modules"][0], sorted(names))
    return _run_with_pytest(tree) if plan["pytest"] else _Runner(plan).run(tree, names["candidate"])


def _bind_names(tree: ast.Module, module: str, names: list[str]) -> ast.Module:
    """Import `names` from the module in the first line, and again after each star import, which may hide them."""
    binding = ast.parse(f"from {module} import {', '.join(names)}").body[0]

    def with_binding(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            for field in ("body", "orelse", "finalbody"):
                if isinstance(statement, (ast.If, ast.Try)) and getattr(statement, field, None):
                    setattr(statement, field, list(with_binding(getattr(statement, field))))
            yield statement
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                yield binding

    body = list(with_binding(tree.body))
    first = 1 if ast.get_docstring(tree) is not None else 0
    while first < len(body) and isinstance(body[first], ast.ImportFrom) and body[first].module == "__future__":  # type: ignore[attr-defined]
        first += 1
    return ast.fix_missing_locations(ast.Module([*body[:first], binding, *body[first:]], tree.type_ignores))


class _Runner:
    """Runs tests that need no pytest."""

    def __init__(self, plan: TestPlan) -> None:
        self._plan = plan
        self._failures: list[BaseException] = []
        """In unittest's results."""
        self._started: set[type] = set()
        """Test cases that the tests ran themselves."""
        self._module = types.ModuleType("__main__")
        self._module.__file__ = _FILE

    def run(self, tree: ast.Module, candidate: Callable[..., object]) -> BaseException | None:
        """Run the module and the rest; the first failure, or None."""
        sys.modules["__main__"] = self._module  # where unittest.main() looks
        if self._plan["unittest"]:
            self._watch_unittest()
        with Caught() as caught:
            exec(compile(tree, _FILE, "exec", dont_inherit=True), vars(self._module))
        end = caught.error
        if isinstance(end, SystemExit) and (not end.code or (end.code == _NO_TESTS_RAN and not self._started)):
            end = None
        if self._failures or end is not None:
            return self._failures[0] if self._failures else end
        with Caught() as caught:
            self._run_functions(candidate)
            self._run_classes()
            if self._plan["unittest"]:
                self._run_test_cases()
        return caught.error or next(iter(self._failures), None)

    def _watch_unittest(self) -> None:
        """Take note of failures and started tests where all of unittest's runners report them."""
        import unittest

        result = unittest.TestResult

        def watch(name: str, note: Callable[..., object]) -> None:
            original = getattr(result, name)

            def method(self: object, *arguments: object) -> object:
                note(*arguments)
                return original(self, *arguments)

            setattr(result, name, method)

        failures = self._failures
        watch("startTest", lambda test: self._started.add(type(test)))
        watch("addFailure", lambda test, error: failures.append(error[1]))
        watch("addError", lambda test, error: failures.append(error[1]))
        watch("addSubTest", lambda test, subtest, error: failures.append(error[1]) if error is not None else None)
        watch("addUnexpectedSuccess", lambda test: failures.append(AssertionError("unexpected success")))

    def _run_functions(self, candidate: Callable[..., object]) -> None:
        functions = self._plan["functions"]
        _call_hook(self._module, "setup_module", self._module)
        for name, takes_candidate in functions:
            function = getattr(self._module, name)
            _call_hook(self._module, "setup_function", function)
            _expect_no_false(function(candidate) if takes_candidate else function())
            _call_hook(self._module, "teardown_function", function)
        _call_hook(self._module, "teardown_module", self._module)

    def _run_classes(self) -> None:
        for kind in _classes_of(self._module):
            has_constructor = any("__init__" in vars(base) for base in kind.__mro__[:-1])
            if kind.__name__.startswith("Test") and not _is_test_case(kind) and not has_constructor:
                _run_class(kind)

    def _run_test_cases(self) -> None:
        import unittest

        loader = unittest.defaultTestLoader
        if hasattr(self._module, "load_tests") and not self._started:
            suite = loader.loadTestsFromModule(self._module)
        else:
            kinds = [k for k in _classes_of(self._module) if _is_test_case(k) and k not in self._started]
            suite = unittest.TestSuite(map(loader.loadTestsFromTestCase, kinds))
        suite.run(unittest.TestResult())


def _classes_of(owner: object) -> list[type]:
    """The classes that the tests define, not those they import."""
    return [kind for kind in vars(owner).values() if isinstance(kind, type) and kind.__module__ == "__main__"]


def _is_test_case(kind: type) -> bool:
    unittest: Any = sys.modules.get("unittest")
    return unittest is not None and issubclass(kind, unittest.TestCase)


def _run_class(kind: type) -> None:
    """Run the tests of a class that is no unittest.TestCase, each with an instance of its own, and nested classes."""
    _call_hook(kind, "setup_class", kind)
    for name in [name for name in dir(kind) if name.startswith("test") and callable(getattr(kind, name))]:
        instance = kind()
        method = getattr(instance, name)
        for hook in ("setup_method", "setup"):
            _call_hook(instance, hook, method)
        _expect_no_false(method())
        for hook in ("teardown_method", "teardown"):
            _call_hook(instance, hook, method)
    _call_hook(kind, "teardown_class", kind)
    for nested in _classes_of(kind):
        if nested.__name__.startswith("Test"):
            _run_class(nested)


def _call_hook(owner: object, name: str, argument: object) -> None:
    """Call `owner.name` if it is there, with the argument if it takes one."""
    hook = getattr(owner, name, None)
    if hook is None:
        return
    import inspect

    required = [p for p in inspect.signature(hook).parameters.values() if p.default is p.empty]
    hook(argument) if required else hook()


def _expect_no_false(returned: object) -> None:
    if returned is False:
        raise AssertionError("the test returned False")


def _run_with_pytest(tree: ast.Module) -> BaseException | None:
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest

    start = pytest.main
    vars(pytest)["main"] = lambda *arguments, **keywords: 0  # for tests that would start it once more
    with open(_FILE, "w", encoding="utf-8") as file:
        file.write(ast.unparse(tree))
    with open("pytest.ini", "w", encoding="ascii") as file:
        file.write("[pytest]\n")
    failures: list[BaseException] = []

    class Plugin:
        """Keeps what failed, in tests, fixtures and the module itself."""

        @staticmethod
        def pytest_exception_interact(call: Any) -> None:
            failures.append(call.excinfo.value)

        @staticmethod
        @pytest.fixture
        def candidate() -> object:
            """The function under test for tests that take it as an argument."""
            return sys.modules["solution"].candidate

    words = ["-q", "-x", "-s", "--assert=plain", "--noconftest", "--import-mode=importlib"]
    words += ["-p", "no:cacheprovider", f"--rootdir={os.getcwd()}", "-c", "pytest.ini", _FILE]
    status = start(words, plugins=[Plugin()])
    if failures:
        needs_more = type(failures[0]).__name__ == "FixtureLookupError"
        return UnsupportedTest() if needs_more else failures[0]
    if status in (0, _NO_TESTS_RAN):
        return None
    return AssertionError("pytest reports a failure") if status == 1 else UnsupportedTest()
