"""Flags and YAML files to a Config, and back. Flags override the file, the file overrides the defaults."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, overload

import yaml

from megatron_ssft.config import Config, GFPOConfig
from megatron_ssft.config.fields import FlagField, add_flag, flag_fields
from megatron_ssft.errors import UserError

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Program(Generic[C]):
    """Configuration class of a program, with what it leaves out and sets otherwise."""

    config: type[C]
    without: frozenset[str] = frozenset()
    """Fields that the program has no use for: neither flags nor keys."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Field name -> default of this program, where it is not the field's own."""

    @property
    def sections(self) -> dict[str, type]:
        """Name of a section -> its dataclass."""
        return typing.get_type_hints(self.config)

    def fields(self) -> dict[str, tuple[str, FlagField]]:
        """Field name -> (section name, field), of all that it takes, with the program's own defaults."""
        return {
            field.name: (section, dataclasses.replace(field, default=self.defaults.get(field.name, field.default)))
            for section, cls in self.sections.items()
            for field in flag_fields(cls)
            if field.name not in self.without
        }


PRETRAIN = Program(Config)
ANY_RUN = Program(GFPOConfig)
"""Takes the keys of every program: for reading what some run was configured by."""


def build_parser(description: str, program: Program = PRETRAIN, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser with one flag for every configuration field; flags that are not given leave no attribute."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--help] [--config FILE] [--dry-run] [--FLAG VALUE ...]",  # of a hundred, --help tells
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="print everything resolved and stop")
    fields = program.fields()
    for section, cls in program.sections.items():
        members = [field for owner, field in fields.values() if owner == section]
        if members:
            group = parser.add_argument_group(section, inspect.getdoc(cls))
            for field in members:
                add_flag(group, field, negatable=True)
    return parser


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
            values[name] = _coerce(path, fields[name][1], value)
    return values


def _coerce(path: str, field: FlagField, value: object) -> object:
    """YAML value to the field's type; YAML reads 1e-3 as a string and one file as a scalar."""
    kind: Callable[[object], object] = field.kind
    try:
        if field.many:
            return [kind(v) for v in (value if isinstance(value, list) else [value])]
        if field.kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool | list | dict):
            raise ValueError
        if field.kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {field.name}: {value!r} is not of type {field.kind.__name__}") from error


@overload
def build_config(values: Mapping[str, object]) -> Config: ...


@overload
def build_config(values: Mapping[str, object], config: type[C]) -> C: ...


def build_config(values: Mapping[str, object], config: type[Config] = Config) -> Config:
    """A validated configuration from flat values, of the class `config`. Raises UserError."""
    everything = Program(config)
    fields = everything.fields()
    sections: dict[str, dict[str, object]] = {section: {} for section in everything.sections}
    for name, value in values.items():
        sections[fields[name][0]][name] = value
    return config(**{section: cls(**sections[section]) for section, cls in everything.sections.items()})


Complete = Callable[[dict[str, object]], dict[str, object]]
"""Adds values to those given by flags and file, such as the shape of the model that is loaded. Raises UserError."""


def _as_given(values: dict[str, object]) -> dict[str, object]:
    return values


@overload
def parse_arguments(
    description: str, argv: Sequence[str] | None = None, complete: Complete = _as_given, *, prog: str | None = None
) -> tuple[Config, bool]: ...


@overload
def parse_arguments(
    description: str, argv: Sequence[str] | None, complete: Complete, program: Program[C], prog: str | None = None
) -> tuple[C, bool]: ...


def parse_arguments(
    description: str,
    argv: Sequence[str] | None = None,
    complete: Complete = _as_given,
    program: Program = PRETRAIN,
    prog: str | None = None,
) -> tuple[Config, bool]:
    """The resolved configuration and whether --dry-run was given.

    `prog`: what the user called the program by; default: the name of the script. Raises UserError.
    """
    given = vars(build_parser(description, program, prog).parse_args(argv))
    dry_run = bool(given.pop("dry_run", False))
    config_file = given.pop("config", None)
    values = read_config_file(config_file, program) if config_file is not None else {}
    if {"train_iters", "train_epochs"} & given.keys():  # a flag for one replaces the file's other
        values = {k: v for k, v in values.items() if k not in ("train_iters", "train_epochs")}
    return build_config(dict(program.defaults) | complete(values | given), program.config), dry_run


def to_yaml(config: Config, program: Program = PRETRAIN) -> str:
    """The resolved configuration, readable by --config; each section begins with a comment."""
    fields = program.fields()
    lines = []
    for section, cls in program.sections.items():
        part = {k: v for k, v in dataclasses.asdict(getattr(config, section)).items() if k in fields}
        if part:
            lines.append(f"# {section}: {inspect.getdoc(cls)}")
            lines.append(yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=100).rstrip())
    return "\n".join(lines) + "\n"
