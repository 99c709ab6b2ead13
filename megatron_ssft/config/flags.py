"""Flags and YAML files to a Config, and back. Flags override the file, the file overrides the defaults."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import yaml

from megatron_ssft.config import ConversionConfig, GFPOConfig, ProgramConfig, RunConfig, SSFTConfig
from megatron_ssft.config.bounds import within_bounds
from megatron_ssft.config.checks import finite
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.fields import FlagField, add_flag, flag_fields
from megatron_ssft.config.named_files import refuse_special_file, refuse_special_files
from megatron_ssft.config.yaml_file import Setting, read_settings
from megatron_ssft.errors import UserError

T = TypeVar("T")
C = TypeVar("C", SSFTConfig, GFPOConfig, ConversionConfig)
P = TypeVar("P", bound=ProgramConfig)
PROGRAMS: tuple[type[ProgramConfig], ...] = (SSFTConfig, GFPOConfig, ConversionConfig)


def sections_of(config: type) -> dict[str, type]:
    """Name of a section -> its dataclass, of a configuration and of those that it is composed of."""
    sections: dict[str, type] = {}
    for name, cls in typing.get_type_hints(config).items():
        if typing.get_origin(cls) is typing.ClassVar:
            continue
        sections |= sections_of(cls) if cls is RunConfig else {name: cls}
    return sections


def fields_of(config: type[ProgramConfig]) -> dict[str, tuple[str, FlagField]]:
    """Field name -> (section name, field), with the program's own defaults."""
    return {
        field.name: (section, dataclasses.replace(field, default=config.defaults.get(field.name, field.default)))
        for section, cls in sections_of(config).items()
        for field in flag_fields(cls)
    }


def all_fields() -> dict[str, tuple[str, FlagField]]:
    """The fields of every program: the keys that some run's config.yaml may have."""
    return {name: entry for config in reversed(PROGRAMS) for name, entry in fields_of(config).items()}


def build_parser(
    description: str, config: type[ProgramConfig] = SSFTConfig, prog: str | None = None
) -> argparse.ArgumentParser:
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
    asked = parser.add_argument_group("dry run", inspect.getdoc(DryRun))
    for field in flag_fields(DryRun):
        add_flag(asked, field)
    fields = fields_of(config)
    for section, cls in sections_of(config).items():
        group = parser.add_argument_group(section, inspect.getdoc(cls))
        for owner, field in fields.values():
            if owner == section:
                add_flag(group, field, negatable=True)
    return parser


def read_config_file(path: str, config: type[ProgramConfig] | None = None) -> dict[str, Any]:
    """The YAML file as flat keys with underscores. Raises UserError naming the file for anything unusable.

    `config`: the program whose keys are expected; None: those of any.
    """
    everything = all_fields()
    fields = everything if config is None else fields_of(config)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for setting in read_settings(path):
        name, place = setting.key.replace("-", "_"), setting.place
        if name not in fields and name in everything:
            raise UserError(
                f"{place}: key {setting.key!r} is for another program, this one has no use for it; leave it out"
            )
        if name not in fields:
            raise UserError(f"{place}: unknown key {setting.key!r}; --help lists the flags, whose names are the keys")
        if name in places:
            raise UserError(f"{place}: {name} is given already at {places[name]}; leave one of them out")
        places[name] = place
        value = _typed(setting, fields[name][1])
        if value is not None:
            values[name] = value
    return values


def _typed(setting: Setting, field: FlagField) -> object:
    """The value in the field's type, read as a flag's; None where null means the field's default. Raises UserError."""
    value = setting.value
    if setting.problem is not None:
        raise UserError(f"{setting.place}: {field.name}: {setting.problem}")
    if value is None:
        if field.default is not None and field.default is not dataclasses.MISSING:
            raise UserError(f"{setting.place}: {field.name} needs a value; leave the line out to have the default")
        return None
    try:
        if field.many:
            return [_read(field, item) for item in (value if isinstance(value, list) else [value])]
        return _read(field, value)
    except ValueError as error:
        reason = f": {error}" if str(error) else ""
        raise UserError(
            f"{setting.place}: {field.name}: {value!r} is not of type {field.kind.__name__}{reason}"
        ) from error


def _read(field: FlagField, value: object) -> object:
    """Raises ValueError."""
    if isinstance(value, bool) != (field.kind is bool) or not isinstance(value, bool | str):
        raise ValueError
    return field.read(value) if isinstance(value, str) else value


def build_config(values: Mapping[str, Any], config: type[C]) -> C:
    """A validated configuration from flat values. Raises UserError."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in sections_of(config)}
    fields = fields_of(config)
    for name, value in (dict(config.defaults) | dict(values)).items():
        sections[fields[name][0]][name] = value
    return _compose(config, sections)


def with_values(config: C, changes: Mapping[str, Any]) -> C:
    """A copy with other values of these fields, by flat names, validated as a whole. Raises UserError."""
    values = {name: value for section in flat(config).values() for name, value in section.items()}
    return build_config(values | dict(changes), type(config))


def _compose(cls: type[T], sections: Mapping[str, Mapping[str, Any]]) -> T:
    """A configuration from the values of its sections, those of RunConfig inside it."""
    parts = {}
    for name, part in typing.get_type_hints(cls).items():
        if typing.get_origin(part) is not typing.ClassVar:
            parts[name] = _compose(part, sections) if part is RunConfig else part(**sections[name])
            finite(parts[name])
            within_bounds(parts[name])
    return cls(**parts)


_RIVALS = (
    frozenset({"train_iters", "train_epochs"}),
    frozenset({"load", "origin", "origin_fingerprint"}),
)
"""Flags that answer one question: one of them on the command line replaces all of them in the file."""

Complete = Callable[[dict[str, Any]], dict[str, Any]]
"""Adds values to those given by flags and file, such as the shape of the model that is loaded. Raises UserError."""


def _as_given(values: dict[str, Any]) -> dict[str, Any]:
    return values


def parse_arguments(
    description: str,
    config: type[C],
    argv: Sequence[str] | None = None,
    complete: Complete = _as_given,
    prog: str | None = None,
) -> tuple[C, DryRun | None]:
    """The resolved configuration, and what --dry-run is asked where it was given.

    `prog`: what the user called the program by; default: the name of the script. Raises UserError.
    """
    given = vars(build_parser(description, config, prog).parse_args(argv))
    dry_run = _dry_run(given)
    config_file = given.pop("config", None)
    if config_file is not None:
        refuse_special_file("--config", Path(config_file))
    values = read_config_file(config_file, config) if config_file is not None else {}
    for rivals in _RIVALS:
        if rivals & given.keys():
            values = {name: value for name, value in values.items() if name not in rivals}
    values |= given
    # Before anything reads them, and once more what was proposed for them.
    refuse_special_files((field for _, field in fields_of(config).values()), SimpleNamespace(**values))
    values = complete(values)
    refuse_special_files((field for _, field in fields_of(config).values()), SimpleNamespace(**values))
    return build_config(values, config), dry_run


def _dry_run(given: dict[str, Any]) -> DryRun | None:
    """What --dry-run is asked, taken out of the flags. Raises UserError."""
    asked = {field.name: given.pop(field.name) for field in flag_fields(DryRun) if field.name in given}
    if not given.pop("dry_run", False):
        for name in asked:
            raise UserError(f"--{name.replace('_', '-')}: is a question to --dry-run; add that, or leave this out")
        return None
    dry_run = DryRun(**asked)
    finite(dry_run)
    return dry_run


def flat(config: ProgramConfig) -> dict[str, dict[str, Any]]:
    """Section -> its values by name."""
    values = dataclasses.asdict(config)
    run = values.pop("run")
    return run | values


def fields_in(config: ProgramConfig) -> dict[str, tuple[str, FlagField]]:
    """`fields_of` a configuration's own program."""
    return fields_of(type(config))


def section_of(config: ProgramConfig, section: str) -> Any:
    """The dataclass of a section, by its name."""
    return getattr(config, section) if hasattr(config, section) else getattr(config.run, section)


def with_absolute_paths(config: P) -> P:
    """A copy in which every path is seen from the root, so that it means the same in another working directory."""
    resolved = copy.deepcopy(config)
    for name, (section, field) in fields_in(resolved).items():
        part = section_of(resolved, section)
        value = getattr(part, name)
        if field.flag.path and value is not None:
            absolute = [os.path.abspath(path) for path in value] if field.many else os.path.abspath(value)
            setattr(part, name, absolute)
    return resolved


def to_yaml(config: ProgramConfig) -> str:
    """The resolved configuration, readable by --config; each section begins with a comment."""
    values, lines = flat(config), []
    for section, cls in sections_of(type(config)).items():
        lines.append(f"# {section}: {inspect.getdoc(cls)}")
        lines.append(yaml.safe_dump(values[section], sort_keys=False, allow_unicode=True, width=100).rstrip())
    return "\n".join(lines) + "\n"
