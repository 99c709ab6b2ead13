"""The JSON object that tells a process of the sandbox what to run, and under which restrictions.

For annotations only: the process itself reads the object without importing this file.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

Mechanism = Literal["landlock", "namespaces"]
"""Ways to shut off the file system."""


class TestPlan(TypedDict):
    """What runs of the tests of a function, beside the lines of their module (sandbox/function_test_plan.py)."""

    modules: list[str]
    """Names under which the tests may import the solution; such a module holds the function under test alone."""
    functions: list[tuple[str, bool]]
    """Test functions that the tests leave to a runner, and whether they take the function under test."""
    unittest: bool
    """The tests use unittest, so its results count, wherever they are printed."""
    pytest: bool
    """The tests are a set for pytest."""
    output: bool
    """The tests look at what the function prints, so it goes back to them."""


class Task(TypedDict):
    """What to run."""

    role: Literal["program", "solution", "tests"]
    """`program`: the source is a whole program that reads standard input; `solution`: it defines the function that the
    process then calls for the process of the tests; `tests`: it is the tests."""
    source: str
    preamble: NotRequired[str]
    """Python that runs in the module before the source; not for tests."""
    entry_point: NotRequired[str]
    """The function under test; not for a program, as all that follows."""
    requests: NotRequired[int]
    """Descriptor of the calls."""
    replies: NotRequired[int]
    """Descriptor of their results."""
    returns_output: NotRequired[bool]
    """Whether results hold what the function printed; solution only."""
    report: NotRequired[int]
    """Descriptor of the outcome; tests only, as all that follows."""
    plan: NotRequired[TestPlan]
    float_tolerance: NotRequired[float]
    """How far a returned float may be off, as `plain_values.tolerant_float` defines."""


class ResourceLimits(TypedDict):
    """Hard limits; memory, file_size and stack in bytes."""

    cpu_seconds: int
    memory: int
    file_size: int
    open_files: int
    stack: int


class Specification(Task):
    """A task and its restrictions."""

    mechanism: Mechanism | None
    """None: resource limits are the only restriction."""
    folder: str
    """The program's own, which it may write."""
    root: str
    """Empty folder for the file system of the namespaces."""
    readable: tuple[str, ...]
    """Files and folders the program may read."""
    filter: str
    """System call filter, base64; empty without a mechanism."""
    limits: ResourceLimits
    processor: int
    parent: int
    """Process to die with."""


class Report(TypedDict):
    """What the process of the tests reports."""

    outcome: Literal["passed", "failed", "raised", "gone", "unsupported", "unknown result", "uncalled", "none"]
    """`uncalled`: no call of the function under test was answered. `none` is said by the reader of an empty report."""
    error: str
    """Name of the exception, or with `unknown result` of the returned type, where there is one."""
