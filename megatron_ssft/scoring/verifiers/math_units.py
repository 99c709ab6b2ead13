r"""Units behind a final answer: `60~\mathrm{km/h}`, `5 cm`, `\$18`, `36\text{ square feet}`.

A word is a unit where it is written upright (\text, \mathrm) or has several letters. A single letter without markup is
a variable: `4t` is four times t. Two answers whose units are known and differ are different.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SAME = {
    "mm": ("millimeter", "millimetre"),
    "cm": ("centimeter", "centimetre"),
    "m": ("meter", "metre"),
    "km": ("kilometer", "kilometre"),
    "in": ("inch", "inche"),  # the plural loses an s
    "ft": ("foot", "feet"),
    "yd": ("yard",),
    "mi": ("mile",),
    "mg": ("milligram",),
    "g": ("gram", "gm"),
    "kg": ("kilogram",),
    "lb": ("lbs",),
    "oz": ("ounce",),
    "s": ("sec", "second"),
    "min": ("minute",),
    "h": ("hr", "hour"),
    "day": (),
    "week": (),
    "month": (),
    "year": ("yr",),
    "ml": ("milliliter", "millilitre"),
    "l": ("liter", "litre"),
    "gal": ("gallon",),
    "degree": ("deg",),
    "rad": ("radian",),
    "dollar": ("usd", "buck"),
    "cent": (),
    "eur": ("euro",),
    "gbp": (),
    "hz": ("hertz",),
    "n": ("newton",),
    "j": ("joule",),
    "w": ("watt",),
    "v": ("volt",),
    "k": ("kelvin",),
    "pa": ("pascal",),
    "mol": ("mole",),
    "am": ("a.m",),
    "pm": ("p.m",),
}
_UNITS = {name: unit for unit, others in _SAME.items() for name in (unit, *others)}
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_CURRENCIES = {"€": "eur", "£": "gbp", "¥": "yen", "₹": "rupee", "eur": "eur", "gbp": "gbp", "rs": "rupee"}
_CURRENCIES |= dict.fromkeys(("$", "\\$", "us$", "s\\$", "usd"), "dollar")
_NO_UNITS = frozenset(
    ("and", "or", "to", "mod", "pi", "sqrt", "base", "where", "if", "for", "is", "are", "undefined", "infinity", "inf")
)
"""Words with which something else begins than a unit."""
_OTHER_ANSWERS = frozenset(("and", "or", "not", "but", "no", "wrong", "plus", "minus", "times"))
"""Words after which the answer goes on."""

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_UPRIGHT = re.compile(
    r"(?P<value>.*[\w})\]!])[\s~]*\\(?:text|mathrm)\s*\{(?P<unit>[^{}]*)\}" rf"(?P<power>{_POWER})", re.DOTALL
)
_UPRIGHT_QUOTIENT = re.compile(
    r"(?P<value>.*[\w})\]!])[\s~]*\\frac\{\s*\\(?:text|mathrm)\s*\{(?P<above>[^{}]*)\}\s*\}"
    r"\{\s*\\(?:text|mathrm)\s*\{(?P<below>[^{}]*)\}\s*\}",
    re.DOTALL,
)
_WORDS = re.compile(
    rf"(?P<value>{_NUMBER}|.*[\d}})\]])(?P<gap>[\s~]*)(?P<unit>[A-Za-z][A-Za-z.]*(?:[ /-]+[A-Za-z.]+){{0,4}})"
    rf"(?P<power>{_POWER})",
    re.DOTALL,
)
_CURRENCY = re.compile(r"(-?)\s*((?:US)?\\?\$|[€£¥₹]|USD|EUR|GBP|Rs\.?)\s*(?=[\d.])")
_TEMPERATURE = re.compile(
    r"(?P<value>.*\d)\s*\^\s*\{?\s*\\circ\s*\}?[\s~]*(?:\\(?:text|mathrm)\s*\{\s*)?(?P<scale>[CF])\s*\}?", re.DOTALL
)
_TEXT_OF_UNIT = re.compile(r"[\s~(]*[A-Za-z.'’]+(?:\^?\d)?(?:[\s~,/*(-]+[A-Za-z.'’]+(?:\^?-?\d)?){0,7}[\s~),.]*")


class Quantity(NamedTuple):
    """An answer without its unit."""

    value: str
    unit: str | None
    """One name per unit; None where there is no unit or an unknown one."""


def split_unit(answer: str) -> Quantity:
    """Cut a unit off the end (a currency also off the front); the answer as it is where there is none."""
    if (currency := _CURRENCY.match(answer)) and answer.count("$") <= 1:
        rest = split_unit(answer[currency.end() :])
        return Quantity(currency[1] + rest.value, rest.unit or _CURRENCIES[currency[2].lower().rstrip(".")[-3:]])
    if answer and answer[-1] in "€£¥₹" and re.search(r"\d\s*.\Z", answer):
        return Quantity(answer[:-1].strip(), _CURRENCIES[answer[-1]])
    if temperature := _TEMPERATURE.fullmatch(answer):
        return Quantity(temperature["value"], "degree " + temperature["scale"].lower())
    if quotient := _UPRIGHT_QUOTIENT.fullmatch(answer):
        return Quantity(quotient["value"], _unit(f"{quotient['above']}/{quotient['below']}", ""))
    if (upright := _UPRIGHT.fullmatch(answer)) and _is_upright_unit(upright["unit"], upright["value"]):
        return Quantity(upright["value"].rstrip(), _unit(upright["unit"], upright["power"]))
    if (words := _WORDS.fullmatch(answer)) and _is_spelled_unit(words):
        return Quantity(words["value"].rstrip(), _unit(words["unit"], words["power"]))
    return Quantity(answer, None)


def units_differ(one: Quantity, other: Quantity) -> bool:
    """Whether both have a known unit and not the same; `degree` may be of any scale."""
    if one.unit is None or other.unit is None or one.unit == other.unit:
        return False
    return not ("degree" in (one.unit, other.unit) and "degree" in one.unit and "degree" in other.unit)


def _is_upright_unit(unit: str, value: str) -> bool:
    """Whether an upright word behind a value is its unit, and no constant, condition or second value."""
    words = re.findall(r"[A-Za-z]+", unit)
    if not words or not _TEXT_OF_UNIT.fullmatch(unit) or _goes_on(words):
        return False
    if len(unit.strip()) == 1:
        return unit.strip().lower() in _UNITS and re.search(r"[\d}]\s*\Z", value) is not None
    return True


def _goes_on(words: list[str]) -> bool:
    """Whether words say more of the answer than what it is measured in."""
    return words[0].lower() in _NO_UNITS or not _OTHER_ANSWERS.isdisjoint(word.lower() for word in words)


def _is_spelled_unit(match: re.Match[str]) -> bool:
    """Whether words without markup are a unit: known ones behind any value, others behind a plain number."""
    words = re.findall(r"[A-Za-z]+", match["unit"])
    if _goes_on(words):
        return False
    if match["unit"].lower().strip(".") in ("a.m", "p.m"):
        return True
    is_number = re.fullmatch(_NUMBER, match["value"].strip()) is not None and bool(match["gap"])
    if len(words[0]) == 1:
        return is_number and "/" in match["unit"] and _unit(match["unit"], match["power"]) is not None
    if match["unit"].lower() in _COMPOUND or _singular(words[0]) in _UNITS:
        return True
    return is_number and len(words[0]) >= 3 and not match["power"]


def _unit(unit: str, power: str) -> str | None:
    """The one name of a unit; None if it is unknown."""
    name = " ".join(unit.replace("~", " ").strip(" .,()").split()).lower()
    name = re.sub(r"\s*(?:/|\bper\b)\s*", "/", name)
    exponent = "".join(re.findall(r"-?\d", power))
    for word, number in (("square ", "2"), ("sq ", "2"), ("sq. ", "2"), ("cubic ", "3"), ("cu ", "3")):
        if name.startswith(word):
            name, exponent = name.removeprefix(word), number
    if (raised := re.fullmatch(r"(.*[a-z])\s*\^?\s*(\d)", name)) and not exponent:
        name, exponent = raised.groups()
    parts = [_UNITS.get(_singular(part.strip())) for part in _COMPOUND.get(name, name).split("/")]
    known = [part for part in parts if part is not None]
    return "/".join(known) + exponent if len(known) == len(parts) else None


def _singular(word: str) -> str:
    word = word.lower()
    return word if word in _UNITS else word.removesuffix("s")
