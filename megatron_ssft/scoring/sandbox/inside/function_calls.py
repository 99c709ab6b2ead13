"""Tests of a function across two processes: the solution's, which is not trusted, and that of the tests.

The solution sees the arguments of the calls, one after the other, and nothing else of the tests. The tests see plain
data (plain_values.py). A call's reply is [returned value or null, raised exception or null, arguments after the call].
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself would take time at the start of every program
if TYPE_CHECKING:
    from typing import Any

    from megatron_ssft.scoring.sandbox.inside import plain_values
    from megatron_ssft.scoring.sandbox.inside.specification import Report
else:  # child.py found this file by its bare name
    import plain_values

_MORE_THAN_A_TEXT = ("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError", "ExceptionGroup")
"""Exceptions that cannot be made from a message alone."""


class _Caught:
    """Keeps what a block of foreign code raises, whatever it is."""

    error: BaseException | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        self.error = error
        return True


class SolutionError(Exception):
    """The solution raised an exception that is not one of Python's own."""


class SolutionGone(Exception):
    """The process of the solution ended or broke its side of the connection."""


class UnsupportedCall(Exception):
    """The tests pass something that is not plain data."""


def serve(namespace: dict[str, Any], entry_point: str, requests: int, replies: int) -> None:
    """Answer calls until the tests hang up."""
    function = _find_function(namespace, entry_point)
    while True:
        try:
            arguments, keywords = plain_values.decode(plain_values.receive(requests))
        except EOFError:
            return
        before = [plain_values.encode(argument) for argument in arguments]
        value = None
        with _Caught() as caught:
            value = plain_values.encode(function(*arguments, **keywords))
        if isinstance(caught.error, MemoryError):
            raise caught.error  # told apart by the parent, like a program's
        raised = None if caught.error is None else [type(caught.error).__name__, str(caught.error)[:1000]]
        after = [plain_values.encode(argument) for argument in arguments]
        changed = [new if new != old else None for new, old in zip(after, before)]
        plain_values.send(replies, [value, raised, changed])


def _find_function(namespace: dict[str, Any], entry_point: str) -> Callable[..., object]:
    """Look for the function of that name; failing that, a method of `Solution()`, or of the class before the dot."""
    if "." in entry_point:
        owner, name = entry_point.rsplit(".", 1)
        return getattr(namespace[owner](), name)
    if entry_point not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), entry_point)
    if entry_point not in namespace:
        raise NameError(f"name {entry_point!r} is not defined")
    return namespace[entry_point]


def run_tests(source: str, entry_point: str, requests: int, replies: int, report: int) -> None:
    """Run the tests and write a `Report` to the descriptor `report`.

    If the tests define `check`, as HumanEval's do, and never call it, it is called with the function.
    """
    raised_by_solution: list[tuple[Exception, str]] = []
    remote = _remote(requests, replies, raised_by_solution)
    name = entry_point.rsplit(".", 1)[-1]
    namespace: dict[str, Any] = {"__name__": "__main__", name: remote, "candidate": remote}
    with _Caught() as caught:
        exec(compile(source, "tests.py", "exec", dont_inherit=True), namespace)
        if "def check(" in source and "check(" not in source.replace("def check(", ""):
            namespace["check"](remote)
    os.write(report, json.dumps(_report(caught.error, raised_by_solution)).encode())
    os._exit(0)


def _report(error: BaseException | None, raised_by_solution: list[tuple[Exception, str]]) -> Report:
    """Tell from the exception that ended the tests, if there is one, how they went."""
    kind = type(error).__name__
    if error is None:
        return {"outcome": "passed", "error": kind}
    if isinstance(error, SolutionGone):
        return {"outcome": "gone", "error": kind}
    if isinstance(error, UnsupportedCall):
        return {"outcome": "unsupported", "error": kind}
    for raised, name in raised_by_solution:
        if error is raised:
            return {"outcome": "raised", "error": name}
    return {"outcome": "failed", "error": kind}


def _remote(requests: int, replies: int, raised: list[tuple[Exception, str]]) -> Callable[..., object]:
    """Make the function under test, as the tests see it.

    What it raises for the solution is added to `raised`, with the name that the exception has there.
    """

    def candidate(*arguments: object, **keywords: object) -> object:
        message = plain_values.encode([list(arguments), keywords])
        if '["opaque", ' in json.dumps(message):
            raise UnsupportedCall
        try:
            plain_values.send(requests, message)
            value, error, changed = plain_values.receive(replies)
            value = plain_values.decode(value)
            changes = [None if item is None else plain_values.decode(item) for item in changed]
            name, text = error or ("", "")
        except (EOFError, OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
            raise SolutionGone from problem
        for argument, new in zip(arguments, changes):
            if type(argument) is type(new):
                _update(argument, new)
        if error is not None:
            raised.append((_exception(str(name), str(text)), str(name)))
            raise raised[-1][0]
        return value

    return candidate


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and name not in _MORE_THAN_A_TEXT:
        return kind(text)
    return SolutionError(text)


def _update(argument: object, new: Any) -> None:
    """Bring what the solution did to an argument in place into the tests' own object; both have one type."""
    if isinstance(argument, (list, bytearray)):
        argument[:] = new
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(new)
