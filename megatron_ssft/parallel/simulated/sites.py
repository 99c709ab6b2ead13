"""Where in the code something happened: the innermost line that is neither torch's nor Python's own."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = str(Path(__file__).parent)
_CALLS = str(Path(__file__).parents[1] / "cuda_calls.py")
_TORCH = str(Path(torch.__file__).parent)
_PYTHON = sysconfig.get_paths()["stdlib"]
_PACKAGES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
_PROJECT = str(Path(__file__).parents[3])
_names: dict[str, str | None] = {}


@dataclass(frozen=True)
class Site:
    """A line of code."""

    file: str
    """From the folder that holds the package on."""
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


NOWHERE = Site("?", 0, "?")


def here() -> Site:
    """The innermost line of the project, of megatron-core or of another package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        name = _names[path] if path in _names else _named(path)
        if name is not None:
            return Site(name, frame.f_lineno, frame.f_code.co_name)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return NOWHERE


def innermost_of(functions: frozenset[str]) -> str | None:
    """The innermost function that is being run and has one of these names, torch's own included."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in functions:
            return frame.f_code.co_name
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _named(path: str) -> str | None:
    """A file's name for a person; None for one of torch, of Python or of this folder."""
    name: str | None = path
    in_packages = next((folder for folder in _PACKAGES if path.startswith(folder)), None)
    if path.startswith((_HERE, _TORCH, _CALLS, "<")) or (in_packages is None and path.startswith(_PYTHON)):
        name = None
    elif in_packages is not None:
        name = path[len(in_packages) + 1 :]
    elif path.startswith(_PROJECT):
        name = path[len(_PROJECT) + 1 :]
    _names[path] = name
    return name
