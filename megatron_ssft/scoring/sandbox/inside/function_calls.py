"""Tests of a function across two processes: the solution's, which is not trusted, and that of the tests.

The solution sees the arguments of the calls, one after the other, and nothing else of the tests. The tests see plain
data (plain_values.py). A call's reply is [returned value or null, raised exception or null, arguments after the call,
printed text if the tests look at it].
Tests have passed when nothing in them failed, every call was answered, and there was at least one: a solution that
cannot be called passes nothing, whatever the tests make of its absence.
"""

from __future__ import annotations

import _thread
import builtins
import io
import json
import os
import sys
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself would take time at the start of every program
if TYPE_CHECKING:
    from typing import Any

    from megatron_ssft.scoring.sandbox.inside import plain_values, runners
    from megatron_ssft.scoring.sandbox.inside.specification import Report, Task
else:  # child.py found this file by its bare name
    import plain_values
    import runners

_MORE_THAN_A_TEXT = ("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError", "ExceptionGroup")
"""Exceptions that cannot be made from a message alone."""


class SolutionError(Exception):
    """The solution raised an exception that is not one of Python's own."""


class SolutionGone(Exception):
    """The process of the solution ended or broke its side of the connection."""


class UnsupportedCall(Exception):
    """The tests pass something that is not plain data."""


def serve(namespace: dict[str, Any], preamble_names: frozenset[str], task: Task) -> None:
    """Answer calls until the tests hang up.

    `preamble_names`: what the module holds without being the solution's own; no entry point is found there.
    """
    function = _find_function(namespace, preamble_names, task["entry_point"])
    decoder = plain_values.Decoder(load_numpy=True)
    while True:
        try:
            arguments, keywords = decoder.decode(plain_values.receive(task["requests"]))
        except EOFError:
            return
        before = [plain_values.encode(argument) for argument in arguments]
        value, printed, stdout = None, io.StringIO(), sys.stdout
        if task["returns_output"]:
            sys.stdout = printed
        with runners.Caught() as caught:
            value = plain_values.encode(function(*arguments, **keywords))
        sys.stdout = stdout
        if isinstance(caught.error, MemoryError):
            raise caught.error  # told apart by the parent, like a program's
        raised = None if caught.error is None else [type(caught.error).__name__, str(caught.error)[:1000]]
        after = [plain_values.encode(argument) for argument in arguments]
        changed = [new if new != old else None for new, old in zip(after, before)]
        plain_values.send(task["replies"], [value, raised, changed, printed.getvalue()])


def _find_function(
    namespace: dict[str, Any], preamble_names: frozenset[str], entry_point: str
) -> Callable[..., object]:
    """Look for the function of that name; failing that, a method of `Solution()`, or of the class before the dot.

    What a star import brought comes last: it holds names that nobody meant, like itertools' `count`.
    """
    owner, _, name = entry_point.rpartition(".")
    if owner:
        return getattr(namespace[owner](), name)
    defined = namespace.get(name)
    is_own = getattr(defined, "__module__", plain_values.SOLUTION_MODULE) == plain_values.SOLUTION_MODULE
    is_given = name in namespace and name not in preamble_names
    if is_given and is_own:
        return namespace[name]
    if hasattr(namespace.get("Solution"), name):
        return getattr(namespace["Solution"](), name)
    if is_given:
        return namespace[name]
    raise NameError(f"name {name!r} is not defined")


def run_tests(task: Task) -> None:
    """Run the tests and write a `Report` to the task's descriptor for it."""
    connection = _Connection(task["requests"], task["replies"], task["float_tolerance"])

    def candidate(*arguments: object, **keywords: object) -> object:
        return connection.call(arguments, keywords)

    candidate.__name__ = task["entry_point"].rpartition(".")[2]
    names = {candidate.__name__: candidate, "candidate": candidate}
    with runners.Caught() as caught:
        caught.error = runners.run(task["source"], names, task["plan"])
    os.write(task["report"], json.dumps(connection.report(caught.error)).encode())
    os._exit(0)


class _Connection:
    """The way from the tests to the solution, and what became of the calls on it."""

    def __init__(self, requests: int, replies: int, float_tolerance: float) -> None:
        self._requests, self._replies = requests, replies
        self._lock = _thread.allocate_lock()
        self._answered = 0
        self._is_gone = self._is_unsupported = False
        self._unknown: list[str] = []
        self._raised: list[tuple[Exception, str]] = []
        self._decoder = plain_values.Decoder(
            load_numpy=False, make_float=plain_values.tolerant_float(float_tolerance), note=self._unknown.append
        )

    def call(self, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        """Have the solution called. Raises what it raised, SolutionGone, UnsupportedCall."""
        message = plain_values.encode([list(arguments), keywords])
        if '["opaque", ' in json.dumps(message):
            self._is_unsupported = True
            raise UnsupportedCall
        with self._lock:
            value, error, changes = self._exchange(message)
        self._answered += 1
        for argument, new in zip(arguments, changes):
            if type(argument) is type(new):
                _update(argument, new)
        if error is not None:
            name, text = error
            self._raised.append((_exception(str(name), str(text)), str(name)))
            raise self._raised[-1][0]
        return value

    def _exchange(self, message: object) -> tuple[object, list[object] | None, list[object]]:
        """Send a call and receive the returned value, the raised [name, text] and the changed arguments, or None."""
        if self._is_gone:
            raise SolutionGone
        decode = self._decoder.decode
        try:
            plain_values.send(self._requests, message)
            value, error, changed, printed = plain_values.receive(self._replies)
            value, changes = decode(value), [None if item is None else decode(item) for item in changed]
            if error is not None:
                name, text = error
                error = [name, text]
            sys.stdout.write(printed)
            return value, error, changes
        except (
            *(EOFError, OSError, ValueError, TypeError, AttributeError, ImportError),
            *(LookupError, ArithmeticError, RecursionError, MemoryError),
        ) as problem:
            self._is_gone = True
            raise SolutionGone from problem

    def report(self, error: BaseException | None) -> Report:
        """Tell how the tests went; `error` is their first failure."""
        kind = type(error).__name__
        if self._is_gone:
            return {"outcome": "gone", "error": kind}
        if self._is_unsupported or isinstance(error, runners.UnsupportedTest):
            return {"outcome": "unsupported", "error": kind}
        if error is None:
            return {"outcome": "passed" if self._answered else "uncalled", "error": kind}
        for raised, name in self._raised:
            if error is raised:
                return {"outcome": "raised", "error": name}
        if self._unknown:
            return {"outcome": "unknown result", "error": self._unknown[0]}
        return {"outcome": "failed", "error": kind}


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and name not in _MORE_THAN_A_TEXT:
        return kind(text)
    return SolutionError(text)


def _update(argument: Any, new: Any) -> None:
    """Bring what the solution did to an argument in place into the tests' own object; both have one type."""
    if isinstance(argument, (list, bytearray)):
        argument[:] = new
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(new)
    elif type(argument).__name__ == "deque":
        argument.clear()
        argument.extend(new)
    elif type(argument).__name__ == "array":
        argument[:] = new
    elif type(argument).__name__ == "ndarray" and argument.shape == new.shape:
        argument[...] = new
