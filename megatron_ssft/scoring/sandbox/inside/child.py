"""Runs one program inside the walls: `python -I child.py SPEC_FD READY_FD`, SPEC_FD holding a JSON object.

    role      "program": the source is a whole program that reads standard input; "solution": it defines the function
              that the process then calls for the tests' process; "tests": the source is the tests
    source, entry_point, requests, replies, report     text and descriptors, as the role needs them
    walls     "landlock", "namespaces" or null
    folder, root, readable, filter, limits, processor, parent

One byte on READY_FD says that the walls stand; until then no line of the source has run, after it nothing of this file
matters to the verdict except in the process of the tests.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import function_calls
import restrictions as walls

del sys.path[0]


def main() -> None:
    """Read the specification, build the walls, play the role."""
    spec_descriptor, ready = int(sys.argv[1]), int(sys.argv[2])
    with open(spec_descriptor, encoding="utf-8") as file:
        spec = json.load(file)
    _build_walls(spec)
    sys.dont_write_bytecode = True
    sys.argv = ["program.py"]
    sys.excepthook = _name_the_exception
    os.write(ready, b"1")
    os.close(ready)
    if spec["role"] == "tests":
        function_calls.run_tests(spec["source"], spec["entry_point"], spec["requests"], spec["replies"], spec["report"])
    elif spec["role"] == "solution":
        module = _run(spec["source"], "solution")
        function_calls.serve(vars(module), spec["entry_point"], spec["requests"], spec["replies"])
    else:
        _run(spec["source"], "__main__")


def _build_walls(spec: dict) -> None:
    walls.use_one_processor(spec["processor"])
    if spec["walls"] == "namespaces":
        walls.enter_namespaces(spec["folder"], spec["root"], spec["readable"])
    walls.limit_resources(**spec["limits"])
    if spec["walls"] == "landlock":
        walls.enter_landlock(spec["folder"], spec["readable"])
    walls.die_with_parent(spec["parent"])  # a change of user namespace may undo it, so after that
    if spec["walls"] is not None:
        walls.lock(base64.b64decode(spec["filter"]))


def _name_the_exception(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """Instead of a traceback, which nobody reads. The text is known to sandbox.py."""
    too_large = isinstance(error, OSError) and error.errno == errno.EFBIG
    os.write(2, f"\nended by: {'FileTooLarge' if too_large else kind.__name__}".encode())


def _run(source: str, name: str) -> types.ModuleType:
    """Run the source as the module `name`."""
    module = types.ModuleType(name)
    module.__file__ = "program.py"
    sys.modules[name] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), vars(module))
    return module


if __name__ == "__main__":
    main()
