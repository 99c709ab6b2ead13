"""Settings in a YAML file: flat `key: value` lines, every value kept as it is spelled.

YAML would turn `007` into 7, `12:30` into 750 and `1.10` into 1.1. Here the field that a value is for says how it is
read, as it does for a flag. Only null, true and false are YAML's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ssft.errors import UserError

_TAG = "tag:yaml.org,2002:"
_TRUE = ("true", "yes", "on")
Scalar = str | bool | None


@dataclass(frozen=True)
class Setting:
    """One line of the file."""

    key: str
    value: Scalar | list[Scalar]
    """None for null; a text otherwise, but for true and false."""
    place: str
    """`file:line`."""
    problem: str | None
    """Why the value cannot be used."""


def read_settings(path: str) -> list[Setting]:
    """The settings of a file, in its order. Raises UserError, led by the file and mostly the line."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}:{line}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; expected `key: value` lines") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:1: expected `key: value` lines")
    return [_setting(path, key, value) for key, value in root.value]


def _setting(path: str, key: yaml.Node, value: yaml.Node) -> Setting:
    place = f"{path}:{key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{place}: expected `key: value` lines")
    is_list = isinstance(value, yaml.SequenceNode) and value.tag == _TAG + "seq"
    nodes = value.value if is_list else [value]
    problems = [problem for node in nodes if (problem := _problem(node)) is not None]
    if problems:
        return Setting(key.value, None, place, problems[0])
    values = [_scalar(node) for node in nodes]
    return Setting(key.value, values if is_list else values[0], place, None)


def _problem(node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith(_TAG):
        return "expected a number, a text, true, false or null"
    if node.value == "None" and node.style is None:
        return "None is a text in YAML; write null, or quote it where the text is meant"
    return None


def _scalar(node: yaml.Node) -> Scalar:
    """The value as it is spelled."""
    if node.tag == _TAG + "null":
        return None
    return node.value.lower() in _TRUE if node.tag == _TAG + "bool" else str(node.value)
