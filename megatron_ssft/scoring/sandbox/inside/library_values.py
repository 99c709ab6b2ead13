"""Values of the standard library's own types, and of numpy's, as plain data and back.

A value is taken apart in the process that made it. It is put together from the parts by the type's own constructor, in
a process that does not trust the other one. An instance of a subclass becomes one of the type named here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself would take time at the start of every program
if TYPE_CHECKING:
    from typing import Any

NUMPY_KINDS = "biufcUS"
"""Array types whose items are plain data: numpy's letters for them."""
_FACTORIES: tuple[type, ...] = (int, float, str, bool, list, dict, set, tuple)


class Inexpressible:
    """A part that cannot be passed on, and without which the value is worth having all the same."""


def parts_of(value: object) -> tuple[str, list[object]] | None:
    """Name a value's kind and its parts, which are simpler values; None for types that are not known here."""
    for kind, (module, name, take_apart, _) in _KINDS.items():
        # A type whose module nobody has loaded has no instances, and loading it takes time.
        known = getattr(sys.modules.get(module), name, None)
        if isinstance(known, type) and isinstance(value, known):
            return kind, take_apart(value)
    return None


def rebuild(kind: str, parts: list[Any]) -> object:
    """Put a value together. Raises KeyError for an unknown kind, and whatever the type's constructor raises."""
    module, name, _, build = _KINDS[kind]
    return build(getattr(importlib.import_module(module), name), *parts)


def named_tuple_parts(value: tuple[object, ...]) -> list[object] | None:
    """Take apart an instance of a named tuple; None for another tuple."""
    fields = getattr(type(value), "_fields", None)
    if isinstance(fields, tuple) and len(fields) == len(value) and all(isinstance(field, str) for field in fields):
        return [type(value).__name__, list(fields), list(value)]
    return None


def rebuild_named_tuple(name: str, fields: list[str], items: list[object]) -> tuple[object, ...]:
    """Make a type of these fields and its instance; an ordinary tuple where the names are no names."""
    make: Any = importlib.import_module("collections").namedtuple
    try:
        kind = make(str(name), [str(field) for field in fields])
    except ValueError:
        return tuple(items)
    return kind(*items)


def numpy_parts(value: Any) -> list[object] | None:
    """Take apart an array or a scalar of numpy: type, shape, items as nested lists; None for items of other kinds."""
    import numpy

    array = numpy.asarray(value)
    if array.dtype.kind not in NUMPY_KINDS:
        return None
    if array.dtype.kind in "fc" and array.dtype.name in ("longdouble", "clongdouble", "float128", "complex256"):
        array = array.astype(complex if array.dtype.kind == "c" else float)
    return [array.dtype.str, list(array.shape), array.tolist()]


def rebuild_numpy(dtype: str, shape: list[int], items: object) -> object:
    """Make the array, or the scalar where `shape` is empty. Raises ValueError, TypeError."""
    import numpy

    if numpy.dtype(dtype).kind not in NUMPY_KINDS:
        raise ValueError("not an array of plain data")
    return numpy.array(items, dtype=dtype).reshape(shape)[()]


def _items(mapping: Any) -> list[object]:
    return [[key, item] for key, item in mapping.items()]


def _default_parts(value: Any) -> list[object]:
    factory = value.default_factory
    name = factory.__name__ if factory in _FACTORIES else Inexpressible()
    return [None if factory is None else name, _items(value)]


def _build_default(kind: Any, factory: object, items: list[Any]) -> object:
    known = [known for known in _FACTORIES if known.__name__ == factory]
    return kind(known[0] if known else None, items)


def _clock(value: Any) -> list[object]:
    offset = value.utcoffset()
    seconds = None if offset is None else offset.total_seconds()
    return [value.hour, value.minute, value.second, value.microsecond, value.fold, seconds]


def _zone(seconds: float | None) -> object:
    import datetime

    return None if seconds is None else datetime.timezone(datetime.timedelta(seconds=seconds))


_KINDS: dict[str, tuple[str, str, Callable[[Any], list[object]], Callable[..., object]]] = {
    "Fraction": ("fractions", "Fraction", lambda v: [v.numerator, v.denominator], lambda kind, *parts: kind(*parts)),
    "Decimal": ("decimal", "Decimal", lambda v: [str(v)], lambda kind, text: kind(text)),
    "datetime": (
        "datetime",
        "datetime",
        lambda v: [v.year, v.month, v.day, *_clock(v)],
        lambda kind, *p: kind(*p[:7], fold=p[7], tzinfo=_zone(p[8])),
    ),
    "date": ("datetime", "date", lambda v: [v.year, v.month, v.day], lambda kind, *parts: kind(*parts)),
    "time": ("datetime", "time", _clock, lambda kind, *p: kind(*p[:4], fold=p[4], tzinfo=_zone(p[5]))),
    "timedelta": (
        "datetime",
        "timedelta",
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda kind, *parts: kind(*parts),
    ),
    "deque": ("collections", "deque", lambda v: [list(v), v.maxlen], lambda kind, items, most: kind(items, most)),
    "Counter": ("collections", "Counter", lambda v: [_items(v)], lambda kind, items: kind(dict(items))),
    "OrderedDict": ("collections", "OrderedDict", lambda v: [_items(v)], lambda kind, items: kind(items)),
    "defaultdict": ("collections", "defaultdict", _default_parts, _build_default),
    "array": ("array", "array", lambda v: [v.typecode, v.tolist()], lambda kind, code, items: kind(code, items)),
    "UUID": ("uuid", "UUID", lambda v: [v.int], lambda kind, number: kind(int=number)),
}
"""Kind -> module and name of the type, its parts, and the value of (type, *parts). A subclass before its base."""
