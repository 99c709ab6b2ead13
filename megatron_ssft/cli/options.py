"""A command's flags from a dataclass: its fields are the flags, their docstrings the help, its checks the refusals."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TypeVar

from megatron_ssft.config.checks import finite
from megatron_ssft.config.fields import add_flag, flag_fields
from megatron_ssft.config.named_files import refuse_special_files

T = TypeVar("T")


def parse_options(
    cls: type[T], description: str | None, argv: Sequence[str] | None = None, prog: str | None = None
) -> T:
    """The dataclass `cls` from a command line.

    Args:
        description: stands above the flags in --help, as it is.
        argv: default: the words that the program was started with.
        prog: what the user called the program by; default: the name of the script.

    Raises:
        UserError: `cls` refuses the values.
        SystemExit: --help, or words that are no flags of `cls`.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_fields(parser, cls)
    return _build(cls, parser.parse_args(argv))


def parse_action(
    actions: Mapping[str, type[T]], description: str | None, argv: Sequence[str] | None = None, prog: str | None = None
) -> T:
    """The dataclass of the action that the command line begins with; otherwise as `parse_options`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="action", required=True, metavar="{" + ",".join(actions) + "}")
    for name, cls in actions.items():
        help_line = (cls.__doc__ or "").partition("\n")[0]
        subparser = subparsers.add_parser(
            name, help=help_line, description=help_line, argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        _add_fields(subparser, cls)
    arguments = parser.parse_args(argv)
    cls = actions[arguments.action]
    del arguments.action
    return _build(cls, arguments)


def _add_fields(parser: argparse.ArgumentParser, cls: type) -> None:
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in flag_fields(cls):
        title = field.flag.group
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(parser if title is None else groups[title], field)


def _build(cls: type[T], arguments: argparse.Namespace) -> T:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()}
    refuse_special_files(flag_fields(cls), arguments)
    options = cls(**values)
    finite(options, unbounded={field.name for field in flag_fields(cls) if field.flag.infinite})
    return options
