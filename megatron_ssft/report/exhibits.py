"""Parts of a report without any markup: sections of exhibits, each a picture with its numbers in words and tables."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

LONGEST = 80
"""Letters of a name from the data that are shown in text."""
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class TableData:
    """A table without its looks. Cells are plain text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    rule: str = ""
    """Which rule the figures follow, or how they are counted."""
    numeric: bool = True
    """The columns after the first hold figures."""


@dataclass(frozen=True)
class Picture:
    """One chart, drawn twice."""

    svg: bytes
    """Follows the reader's light or dark mode."""
    png: bytes
    """Light."""


@dataclass(frozen=True)
class Exhibit:
    """A picture and what it says."""

    key: str
    """Name of the PNG without its ending; unique within a report."""
    title: str
    picture: Picture
    alt: str
    """What a reader sees who sees no pictures."""
    text: str
    """Its key numbers, in sentences; a line each for what is told run by run."""
    tables: tuple[TableData, ...] = ()


@dataclass
class Section:
    """A part of the page."""

    key: str
    title: str
    intro: str = ""
    exhibits: list[Exhibit] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Sentences, one for each picture that the data does not allow: which, and why."""
    tables: list[TableData] = field(default_factory=list)
    folded: list[TableData] = field(default_factory=list)
    """More tables, for whoever opens them."""


def clean(text: object, longest: int = LONGEST) -> str:
    """`text` on one line and of bounded length, without letters that would break a page or turn it around."""
    letters = (_harmless(letter) for letter in str(text)[: 4 * longest])
    plain = " ".join("".join(letters).split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def _harmless(letter: str) -> str:
    if letter.isspace():
        return " "
    return "\ufffd" if letter in _BIDI or unicodedata.category(letter) in ("Cc", "Cs", "Cn", "Co") else letter


def short_names(names: Sequence[str], longest: int = 14) -> list[str]:
    """The names as a picture has room for them: cut in the middle, and still different from each other."""
    short = []
    for name in names:
        name = clean(name)
        half = (longest - 1) // 2
        short.append(name if len(name) <= longest else f"{name[: longest - 1 - half]}…{name[-half:]}")
    counts = {name: short.count(name) for name in short}
    return [name if counts[name] == 1 else f"{name} #{place}" for place, name in enumerate(short, start=1)]


def slugs(names: Sequence[str]) -> dict[str, str]:
    """Part of a file name for each name: the name itself where it is plain, else its number from 1."""
    lower = [name.lower() for name in names]
    plain = [re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,40}", name) and not name.isdigit() for name in lower]
    return {
        name: name if ok and lower.count(name.lower()) == 1 else str(place)
        for place, (name, ok) in enumerate(zip(names, plain), start=1)
    }


def tag_name(tag: int | None) -> str:
    """How people are told of a 0-based tag."""
    return "no tag" if tag is None else f"<think{tag + 1}>"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits; `-` where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if abs(value) < 0.01 else text
    return f"{value:.{digits - 1}e}"


def percent(value: float | None) -> str:
    """A share from 0 to 1."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def join(parts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def thin(x: np.ndarray, y: np.ndarray, most: int = 160) -> tuple[np.ndarray, np.ndarray, int]:
    """At most `most` points: means over runs of as many neighbours each; values that are not finite are left out.

    Returns:
        x and y, float64, and how many points each of them stands for.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x, np.float64)[finite], np.asarray(y, np.float64)[finite]
    run = max(1, -(-len(x) // most))
    starts = np.arange(0, len(x), run)
    if run == 1:
        return x, y, 1
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes, run
