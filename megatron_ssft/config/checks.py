"""Checks of the values of a configuration; each refusal is a UserError."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Collection
from typing import Any

from megatron_ssft.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def finite(section: object, unbounded: Collection[str] = ()) -> None:
    """Raises UserError for a field of a dataclass that is infinite or not a number; `unbounded` names are left out."""
    for name, value in vars(section).items():
        if name in unbounded:
            continue
        numbers = value if isinstance(value, list | tuple) else (value,)
        ok = all(math.isfinite(item) for item in numbers if isinstance(item, float))
        require(ok, f"--{name.replace('_', '-')} {value}: must be a finite number")


def choice(value: str | None, flag: str, *choices: str) -> None:
    """Raises UserError unless the value of `flag` is one of the choices."""
    require(value in choices, f"--{flag} {value}: choose one of {', '.join(choices)}")


def is_date(text: str) -> bool:
    """Whether this is a day of the calendar, as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def positive(section: object, *names: str) -> None:
    """Raises UserError unless these fields are finite numbers above 0, or None."""
    for name in names:
        value = getattr(section, name)
        ok = value is None or 0 < value < math.inf
        require(ok, f"--{name.replace('_', '-')} {value}: must be a finite number greater than 0")


def only_where(section: object, applies: bool, here: str, *names: str) -> None:
    """Raises UserError for a field that is set and changes nothing.

    Args:
        section: a dataclass; a field is set where it has another value than its default.
        applies: whether the fields have a use.
        here: the flag that leaves them none, with its value.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    for name in names:
        value = getattr(section, name)
        flag = f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}"
        shown = "" if isinstance(value, bool) else f" {value}"
        require(applies or value == defaults[name], f"{flag}{shown} has no use {here}; leave it out")


def required() -> Any:
    """A field that has to be given: None until then, and refused by the section's checks."""
    return dataclasses.field(default=None)


def derived() -> Any:
    """A field that the section fills in itself where it is left out, so that afterwards it always has a value."""
    return dataclasses.field(default=None)
