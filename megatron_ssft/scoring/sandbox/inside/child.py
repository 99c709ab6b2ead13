"""Runs one program inside the sandbox: `python -I child.py SPEC_FD READY_FD`.

SPEC_FD holds a `Specification` as JSON. One byte on READY_FD says that the restrictions are in force. Until then no
line of the source has run; after it nothing of this file matters to the verdict, except in the process of the tests.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
import types

TYPE_CHECKING = False  # typing itself would take time at the start of every program
if TYPE_CHECKING:
    from megatron_ssft.scoring.sandbox.inside import function_calls, plain_values, restrictions
    from megatron_ssft.scoring.sandbox.inside.specification import Specification
else:  # started by path, so that the package need not be readable: the neighbours have bare names
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import function_calls
    import plain_values
    import restrictions

    del sys.path[0]


def main() -> None:
    """Read the specification, apply the restrictions, play the role."""
    spec_descriptor, ready = int(sys.argv[1]), int(sys.argv[2])
    with open(spec_descriptor, encoding="utf-8") as file:
        spec: Specification = json.load(file)
    _apply_restrictions(spec)
    sys.dont_write_bytecode = True
    sys.argv = ["program.py"]
    sys.set_int_max_str_digits(0)  # the time limit guards against long conversions too
    sys.excepthook = _name_the_exception
    os.write(ready, b"1")
    os.close(ready)
    if spec["role"] == "tests":
        function_calls.run_tests(spec)
    elif spec["role"] == "solution":
        module, preamble_names = _run(spec, plain_values.SOLUTION_MODULE)
        function_calls.serve(vars(module), preamble_names, spec)
    else:
        _run(spec, "__main__")


def _apply_restrictions(spec: Specification) -> None:
    restrictions.use_one_processor(spec["processor"])
    if spec["mechanism"] == "namespaces":
        restrictions.enter_namespaces(spec["folder"], spec["root"], spec["readable"])
    restrictions.limit_resources(**spec["limits"])
    if spec["mechanism"] == "landlock":
        restrictions.enter_landlock(spec["folder"], spec["readable"])
    restrictions.die_with_parent(spec["parent"])  # a change of user namespace may undo it, so after that
    if spec["mechanism"] is not None:
        restrictions.drop_privileges(base64.b64decode(spec["filter"]))


def _name_the_exception(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """Write the exception's name instead of a traceback, which nobody reads; `programs.ENDED_BY` reads it."""
    too_large = isinstance(error, OSError) and error.errno == errno.EFBIG
    os.write(2, f"\nended by: {'FileTooLarge' if too_large else kind.__name__}".encode())


def _run(spec: Specification, name: str) -> tuple[types.ModuleType, frozenset[str]]:
    """Run the preamble and the source as the module `name`.

    Returns it with those of its names that are the preamble's and not bound by the source itself.
    """
    module = types.ModuleType(name)
    module.__file__ = "program.py"
    sys.modules[name] = module
    program = compile(spec["source"], "program.py", "exec", dont_inherit=True)
    exec(compile(spec.get("preamble", ""), "preamble.py", "exec", dont_inherit=True), vars(module))
    given = dict(vars(module))
    exec(program, vars(module))
    unchanged = {key for key, value in given.items() if vars(module).get(key) is value}
    if name != "__main__" and spec["entry_point"] in unchanged and _binds(spec["source"], spec["entry_point"]):
        unchanged.remove(spec["entry_point"])
    return module, frozenset(unchanged)


def _binds(source: str, name: str) -> bool:
    """Whether the source binds the global name itself, to what it was before: it repeats an import."""
    import symtable

    table = symtable.symtable(source, "program.py", "exec")
    return name in table.get_identifiers() and (table.lookup(name).is_assigned() or table.lookup(name).is_imported())


if __name__ == "__main__":
    main()
