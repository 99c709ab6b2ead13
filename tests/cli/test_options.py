"""Flags from a dataclass: what the annotation, the docstring and the checks of a field amount to."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from megatron_ssft.cli.main import COMMANDS
from megatron_ssft.cli.options import parse_action, parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag, flag_fields
from megatron_ssft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both share."""

    seed: int = 7
    """Decides 100% of the draws."""


@dataclass(frozen=True, kw_only=True)
class Paint(Common):
    """Paint some files."""

    files: Annotated[tuple[Path, ...], Flag(metavar="IN", positional=True)]
    """What is painted."""
    output: Path
    """Where the pictures go."""
    colour: Literal["red", "blue"] = "red"
    """Of the paint."""
    shade: Annotated[str | None, Flag(choices=("dark", "light"))] = None
    """How much of it."""
    sizes: tuple[int, ...] = (1, 2)
    """Of the brushes."""
    day: Annotated[str | None, Flag(read=lambda text: text.upper(), group="when")] = None
    """When."""
    thick: bool = False
    """More of it."""
    dry_first: bool = True
    """Wait before."""
    weight: float | None = None
    """In grams."""

    def __post_init__(self) -> None:
        require(self.weight is None or self.weight > 0, f"--weight {self.weight}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Wash(Common):
    """Wash the brushes."""


def parse(*words):
    return parse_options(Paint, "Some words.", words, "paint")


def test_defaults_and_types():
    flags = parse("a", "b", "--output", "o")
    assert flags == Paint(files=(Path("a"), Path("b")), output=Path("o"))
    words = "a --output o --colour blue --shade dark --sizes 3 --day may --thick --no-dry-first --weight 2 --seed 1"
    assert parse(*words.split()) == Paint(
        files=(Path("a"),), output=Path("o"), colour="blue", shade="dark", sizes=(3,), day="MAY", thick=True,
        dry_first=False, weight=2.0, seed=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--output o", "required: IN"),
        ("a", "required: --output"),
        ("a --output o --colour green", "argument --colour: invalid choice: 'green'"),
        ("a --output o --shade red", "argument --shade: invalid choice: 'red'"),
        ("a --output o --sizes 1 x", "argument --sizes: invalid int value: 'x'"),
        ("a --output o --weight heavy", "argument --weight: invalid float value: 'heavy'"),
        ("a --output o --no-thick", "unrecognized arguments: --no-thick"),
        ("a --out o", "required: --output"),  # no abbreviations: a new flag would change what they mean
    ],
)
def test_what_a_parser_refuses(words, reason, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words.split())
    assert end.value.code == 2
    assert reason in capsys.readouterr().err.replace("the following arguments are required", "required")


def test_what_the_dataclass_refuses():
    with pytest.raises(UserError, match=r"^--weight -1.0: must be positive$"):
        parse("a", "--output", "o", "--weight", "-1")


def test_help_is_made_of_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: paint [-h]") and "Some words." in shown
    assert "IN What is painted. --seed" not in shown and "IN What is painted." in shown
    assert "--seed INT Decides 100% of the draws. [7]" in shown
    assert "--colour {red,blue} Of the paint. ['red']" in shown
    assert "--sizes INT [INT ...] Of the brushes. [1 2]" in shown
    assert "--weight FLOAT In grams. --" not in shown and "None" not in shown
    assert "when: --day STR When." in shown


def test_actions(capsys):
    actions = {"paint": Paint, "wash": Wash}
    assert parse_action(actions, "", ["wash", "--seed", "3"], "studio") == Wash(seed=3)
    assert parse_action(actions, "", ["paint", "a", "--output", "o"], "studio") == parse("a", "--output", "o")
    for words, status in ((["--help"], 0), (["paint", "--help"], 0), ([], 2), (["burn"], 2)):
        with pytest.raises(SystemExit) as end:
            parse_action(actions, "", words, "studio")
        assert end.value.code == status
    said = capsys.readouterr()
    assert "Wash the brushes." in said.out and "usage: studio paint [-h]" in said.out
    assert "invalid choice: 'burn'" in said.err


def option_classes():
    """The dataclasses of all commands; those of `train` and `gfpo` are the configuration's."""
    for command in COMMANDS.values():
        module = importlib.import_module(f"megatron_ssft.cli.{command.module}")
        for name, cls in inspect.getmembers(module, dataclasses.is_dataclass):
            if cls.__module__ == module.__name__ and name.endswith("Flags"):
                yield pytest.param(cls, id=f"{command.module}-{name}")


def test_all_commands_have_such_a_dataclass():
    modules = {param.values[0].__module__.rpartition(".")[2] for param in option_classes()}
    assert modules == {command.module for command in COMMANDS.values()} - {"train", "gfpo"}


@pytest.mark.parametrize("cls", list(option_classes()))
def test_every_flag_of_a_command_is_explained(cls):
    for field in flag_fields(cls):
        assert len(field.doc) > 5 and field.doc.endswith("."), f"{cls.__name__}.{field.name} has no docstring"
        assert len(field.doc.split()) <= 30
