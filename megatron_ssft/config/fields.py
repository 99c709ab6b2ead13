"""Dataclass fields as command-line flags: the annotation says how words are read, the docstring is the help text."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ssft.config.values import reader


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Look of a flag beyond the type of its field; stands beside it: `Annotated[Path, Flag(metavar="DIR")]`."""

    metavar: str | None = None
    """Stands for the value in --help; default: the name of the type."""
    positional: bool = False
    """Given by its place, without the name."""
    choices: tuple[str, ...] | None = None
    """The values there are, where no Literal type lists them."""
    read: Callable[[str], object] | None = None
    """Turns a word into the value and raises ValueError; default: the type."""
    group: str | None = None
    """Heading in --help."""
    path: bool = False
    """A text that names a file or folder, so that ~ and $VARIABLES are replaced; fields of type Path always do."""
    infinite: bool = False
    """A number that may be infinite."""


@dataclass(frozen=True)
class FlagField:
    """One field of a dataclass, as a parser sees it."""

    name: str
    kind: type
    """Type of the value, or of each value, without None."""
    many: bool
    """Takes one or more values."""
    default: object
    """dataclasses.MISSING where it has to be given."""
    doc: str
    flag: Flag
    read: Callable[[str], object]
    """Turns a word into a value; raises ValueError."""


def flag_fields(cls: type) -> list[FlagField]:
    """The fields of dataclass `cls`, those of its base classes first."""
    annotations, docs = typing.get_type_hints(cls, include_extras=True), field_docstrings(cls)
    fields = []
    for field in dataclasses.fields(cls):
        kind, flag = annotations[field.name], Flag()
        kind, flag = _annotated(kind, flag)
        kind, flag = _annotated(_without_none(kind), flag)
        many = typing.get_origin(kind) in (list, tuple)
        if many:
            kind, flag = _annotated(typing.get_args(kind)[0], flag)
        if typing.get_origin(kind) is typing.Literal:
            kind, flag = str, dataclasses.replace(flag, choices=typing.get_args(kind))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        read = flag.read or reader(kind, flag.path or kind is Path)
        fields.append(FlagField(field.name, kind, many, default, docs.get(field.name, ""), flag, read))
    return fields


def _annotated(kind: object, flag: Flag) -> tuple[Any, Flag]:
    """The type without its annotation, and that annotation instead of `flag` where there is one."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Annotated else (kind, flag)


PathText = typing.Annotated[str, Flag(path=True)]
"""A text that names a file or folder."""


def _without_none(kind: object) -> object:
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """The string that follows each field in the source of dataclass `cls` and its bases, white space folded."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef), base
        for node, following in zip(definition.body, definition.body[1:]):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(node.target, ast.Name), base
                docs[node.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def add_flag(parser: argparse._ActionsContainer, field: FlagField, negatable: bool = False) -> None:
    """Let `parser` take the field; a value that is not given leaves no attribute.

    Args:
        negatable: a truth value has --no-NAME beside --NAME, whatever its default.
    """
    name = field.name if field.flag.positional else "--" + field.name.replace("_", "-")
    text = help_text(field.doc, field.default)
    if field.kind is bool:
        if negatable or field.default is True:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(name, action="store_true", help=field.doc.replace("%", "%%"))
        return
    choices = field.flag.choices
    metavar = field.flag.metavar
    if metavar is None and choices is None:
        metavar = "FILE" if field.many and field.kind in (str, Path) else field.kind.__name__.upper()

    def read(word: str) -> object:
        try:
            return field.read(word)
        except ValueError as error:  # argparse itself leaves the reason out
            kind = getattr(field.flag.read or field.kind, "__name__", "")
            raise argparse.ArgumentTypeError(f"invalid {kind} value: {word!r}: {error}") from None

    action = (
        # Given twice, the later values join the earlier ones.
        parser.add_argument(name, action="extend", nargs="+", type=read, metavar=metavar, choices=choices, help=text)
        if field.many
        else parser.add_argument(name, type=read, metavar=metavar, choices=choices, help=text)
    )
    if not field.flag.positional:
        action.required = field.default is dataclasses.MISSING


def help_text(doc: str, default: object) -> str:
    """The docstring, and the default where there is one that says something."""
    text = doc.replace("%", "%%")
    if default is dataclasses.MISSING or default in (None, "", (), []):
        return text
    if isinstance(default, tuple):
        shown = " ".join(map(str, default))
    else:
        shown = str(default) if isinstance(default, Path) else repr(default)
    return f"{text} [{shown}]"
