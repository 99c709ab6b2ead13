"""Flags and YAML files to a Config, and back. Flags override the file, the file overrides the defaults."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_ssft.config import Config, GFPOConfig
from megatron_ssft.errors import UserError


@dataclass(frozen=True)
class Program:
    """What a program is configured by."""

    config: type[Config] = Config
    without: frozenset[str] = frozenset()
    """Fields that it has no use for: neither flags nor keys."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Where it has others than the fields."""

    @property
    def sections(self) -> dict[str, type]:
        """Name of a section -> its dataclass."""
        return typing.get_type_hints(self.config)

    def fields(self) -> dict[str, tuple[str, dataclasses.Field, object]]:
        """Field name -> (section name, field, type without None), of all that it takes."""
        found = {}
        for section, cls in self.sections.items():
            hints = typing.get_type_hints(cls)
            for f in dataclasses.fields(cls):
                kind = hints[f.name]
                if isinstance(kind, types.UnionType):
                    (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
                if f.name not in self.without:
                    found[f.name] = (section, f, kind)
        return found


PRETRAIN = Program()
ANY_RUN = Program(GFPOConfig)
"""Takes the keys of every program: for reading what some run was configured by."""


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """The string that follows each field in the source of dataclass `cls`, white space folded."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for node, following in zip(body, body[1:]):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[node.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def build_parser(description: str, program: Program = PRETRAIN) -> argparse.ArgumentParser:
    """A parser with one flag for every configuration field; flags that are not given leave no attribute."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--help] [--config FILE] [--dry-run] [--FLAG VALUE ...]",  # of a hundred, --help tells
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="print everything resolved and stop")
    fields = program.fields()
    for section, cls in program.sections.items():
        if section not in {owner for owner, _, _ in fields.values()}:
            continue
        group = parser.add_argument_group(section, inspect.getdoc(cls))
        docs = field_docstrings(cls)
        for name, (owner, f, kind) in fields.items():
            if owner != section:
                continue
            options: dict[str, object] = {"help": _help(docs[name], program.defaults.get(name, f.default))}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kind) is list:
                options |= {"nargs": "+", "metavar": "FILE"}
            else:
                options |= {"type": kind, "metavar": kind.__name__.upper()}
            group.add_argument("--" + name.replace("_", "-"), **options)
    return parser


def _help(doc: str, default: object) -> str:
    text = doc.replace("%", "%%")
    if default is dataclasses.MISSING or default is None:
        return text
    return f"{text} [{default!r}]"


def read_config_file(path: str, program: Program = PRETRAIN) -> dict[str, object]:
    """The YAML file as flat keys with underscores. Raises UserError naming the file for anything unusable."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}:{line}: not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}:1: expected `key: value` lines")
    fields, everything = program.fields(), ANY_RUN.fields()
    values = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in fields and name in everything:
            raise UserError(f"{path}: key {key!r} is for another program, this one has no use for it; leave it out")
        if name not in fields:
            raise UserError(f"{path}: unknown key {key!r}; --help lists the flags, whose names are the keys")
        if value is not None:
            values[name] = _coerce(path, name, value, fields[name][2])
    return values


def _coerce(path: str, name: str, value: object, kind: object) -> object:
    """YAML value to the field's type; YAML reads 1e-3 as a string and one file as a scalar."""
    try:
        if typing.get_origin(kind) is list:
            return [str(v) for v in (value if isinstance(value, list) else [value])]
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = getattr(kind, "__name__", str(kind))
        raise UserError(f"{path}: {name}: {value!r} is not of type {wanted}") from error


def build_config(values: dict[str, object], config: type[Config] = Config) -> Config:
    """A validated Config from flat values. Raises UserError."""
    everything = Program(config)
    fields = everything.fields()
    sections: dict[str, dict[str, object]] = {section: {} for section in everything.sections}
    for name, value in values.items():
        sections[fields[name][0]][name] = value
    return config(**{section: cls(**sections[section]) for section, cls in everything.sections.items()})


def parse_arguments(
    description: str,
    argv: list[str] | None = None,
    complete: Callable[[dict[str, object]], dict[str, object]] = lambda values: values,
    program: Program = PRETRAIN,
) -> tuple[Config, bool]:
    """The resolved configuration and whether --dry-run was given.

    `complete` may add values to those given by flags and file, such as the shape of the model that is loaded.
    Raises UserError.
    """
    given = vars(build_parser(description, program).parse_args(argv))
    dry_run = bool(given.pop("dry_run", False))
    config_file = given.pop("config", None)
    values = read_config_file(config_file, program) if config_file is not None else {}
    if {"train_iters", "train_epochs"} & given.keys():  # a flag for one replaces the file's other
        values = {k: v for k, v in values.items() if k not in ("train_iters", "train_epochs")}
    return build_config(dict(program.defaults) | complete(values | given), program.config), dry_run


def to_yaml(config: Config, program: Program = PRETRAIN) -> str:
    """The resolved configuration with a comment a section, readable by --config."""
    fields = program.fields()
    lines = []
    for section, cls in program.sections.items():
        part = {k: v for k, v in dataclasses.asdict(getattr(config, section)).items() if k in fields}
        if part:
            lines.append(f"# {section}: {inspect.getdoc(cls)}")
            lines.append(yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=100).rstrip())
    return "\n".join(lines) + "\n"
