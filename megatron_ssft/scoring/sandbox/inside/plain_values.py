"""Values between two processes that do not trust each other: plain data, rebuilt from its text on the other side.

Numbers, texts, bytes, None and the built-in containers keep their types, and so do the standard library's and numpy's
(library_values.py). Iterators become iterators over a list of their items, objects of a subclass of a plain type that
type; whatever else a program hands out arrives as an `Opaque`, which is equal to nothing. So no method that a program
wrote runs where answers are judged.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator

TYPE_CHECKING = False  # typing itself would take time at the start of every program
if TYPE_CHECKING:
    from typing import Any

    from megatron_ssft.scoring.sandbox.inside import library_values
else:  # child.py found this file by its bare name
    import library_values

MAX_BYTES = 64 << 20
MAX_ITEMS = 100_000
"""Items of an iterator that are passed on."""
SOLUTION_MODULE = "solution"
"""Name of the module that a solution is."""
_SAFE = 2**53
_VIEWS: tuple[type[Iterable[object]], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_FROM_HEX: dict[str, Callable[[str], object]] = {"bytes": bytes.fromhex, "bytearray": bytearray.fromhex}
_FROM_ITEMS: dict[str, Callable[[list[Any]], object]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": iter,
    "range": lambda bounds: range(*bounds),
}
_USES = (
    *("__call__", "__iter__", "__len__", "__getitem__", "__contains__", "__bool__", "__str__", "__format__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"),
    *("__truediv__", "__mod__", "__pow__", "__neg__", "__abs__", "__round__", "__int__", "__float__", "__index__"),
)
"""What tests may do with a value apart from comparing it for equality."""


class Opaque:
    """Stands for a value that is not plain data; equal to nothing, not even itself."""

    def __init__(self, kind: str, note: Callable[[str], object]) -> None:
        """`note` gets the kind when the tests do more with the value than compare it, which cannot work."""
        self._kind, self._note = kind, note

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self._kind}>"

    def __getattr__(self, name: str) -> object:
        self._note(self._kind)
        raise AttributeError(name)


def _unsupported(value: Opaque, *arguments: object) -> object:
    value._note(value._kind)
    raise TypeError(f"{value!r} is not plain data")


for _name in _USES:
    setattr(Opaque, _name, _unsupported)


class ValueTooLarge(Exception):
    """A value exceeds MAX_BYTES as text."""


def encode(value: object) -> object:
    """Turn `value` into something that JSON can hold. Raises RecursionError for one that contains itself."""
    if value is None or value is True or value is False:
        return value
    if type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
        parts = library_values.numpy_parts(value)
        return _encode_unknown(value) if parts is None else ["numpy", [encode(part) for part in parts]]
    if isinstance(value, int):
        value = int(value)
        return value if -_SAFE < value < _SAFE else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__name__ if type(value) in (bytes, bytearray) else "bytes", value.hex()]
    if isinstance(value, tuple) and (parts := library_values.named_tuple_parts(value)) is not None:
        return ["named tuple", [encode(part) for part in parts]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item) for item in value]]
    return _encode_object(value)


def _encode_object(value: object) -> object:
    known = library_values.parts_of(value)
    if known is not None:
        return ["library", [known[0], [encode(part) for part in known[1]]]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, range):
        return ["range", [encode(value.start), encode(value.stop), encode(value.step)]]
    if isinstance(value, memoryview):
        return ["bytes", value.hex()]
    if isinstance(value, _VIEWS):
        return ["list", [encode(item) for item in value]]
    if isinstance(value, Iterator):
        return ["iterator", [encode(item) for _, item in zip(range(MAX_ITEMS), value)]]
    return _encode_unknown(value)


def _encode_unknown(value: object) -> object:
    is_own = isinstance(value, library_values.Inexpressible) or type(value).__module__ == SOLUTION_MODULE
    return ["opaque", [type(value).__name__, is_own]]


class Decoder:
    """Rebuilds values from what `encode` returned."""

    def __init__(
        self,
        *,
        load_numpy: bool,
        make_float: Callable[[float], float] = float,
        note: Callable[[str], object] = lambda kind: None,
    ) -> None:
        """Configure how values look on this side.

        `load_numpy`: its arrays stay arrays; else they do only where numpy is in use already, and are lists elsewhere.
        `make_float`: applied to floats. `note`: gets the kind of each value that may be right and has no plain form.
        """
        self._load_numpy, self._make_float, self._note = load_numpy, make_float, note

    def decode(self, data: object) -> Any:
        """Rebuild a value. Raises ValueError, TypeError, LookupError, ArithmeticError or RecursionError for others."""
        if not isinstance(data, list):
            if isinstance(data, float):
                return self._make_float(data)
            if data is None or isinstance(data, (bool, int, str)):
                return data
            raise ValueError("not an encoded value")
        kind, payload = data
        if kind == "int":
            return int(payload, 16)
        if kind == "complex":
            return complex(*payload)
        if kind in _FROM_HEX:
            return _FROM_HEX[kind](payload)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in payload}
        if kind == "opaque":
            return self._opaque(str(payload[0])[:80], payload[1])
        if kind == "library":
            return library_values.rebuild(payload[0], [self.decode(part) for part in payload[1]])
        if kind == "named tuple":
            return library_values.rebuild_named_tuple(*(self.decode(part) for part in payload))
        if kind == "numpy":
            return self._numpy(*(self.decode(part) for part in payload))
        return _FROM_ITEMS[kind]([self.decode(item) for item in payload])

    def _opaque(self, kind: str, is_own: bool) -> Opaque:
        if not is_own:  # the tests can make an equal one, other than of a class that only the solution knows
            self._note(kind)
        return Opaque(kind, self._note)

    def _numpy(self, dtype: str, shape: list[int], items: object) -> object:
        if self._load_numpy or "numpy" in sys.modules:
            return library_values.rebuild_numpy(dtype, shape, items)
        return items


def tolerant_float(tolerance: float) -> Callable[[float], float]:
    """Make the type of floats that equal every number x within `tolerance` times the largest of 1, |x| and the float.

    `float` itself for a tolerance of 0.
    """
    if not tolerance:
        return float

    class TolerantFloat(float):
        """A float whose equality has a tolerance; everything else is a float's."""

        def __eq__(self, other: object) -> bool:
            if not isinstance(other, (int, float)):
                return float.__eq__(self, other)
            try:
                return math.isclose(self, other, rel_tol=tolerance, abs_tol=tolerance)
            except OverflowError:
                return False

        def __ne__(self, other: object) -> bool:
            return not self == other

        __hash__ = float.__hash__

    return TolerantFloat


def send(descriptor: int, message: object) -> None:
    """Write one message. Raises ValueTooLarge, OSError."""
    data = json.dumps(message).encode("ascii")
    if len(data) > MAX_BYTES:
        raise ValueTooLarge
    view = memoryview(len(data).to_bytes(8, "big") + data)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Any:
    """Read one message. Raises EOFError when the other side is gone, ValueError for what is no message, OSError."""
    size = int.from_bytes(_read(descriptor, 8), "big")
    if size > MAX_BYTES:
        raise ValueError("the message is too long")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
