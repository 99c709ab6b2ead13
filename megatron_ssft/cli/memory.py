"""Memory that is not there: how the libraries say it, and what a person can do about it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from megatron_ssft.errors import UserError

_WANTED = re.compile(r"(?:tried to allocate|unable to allocate) (\d+(?:\.\d*)?) ?(bytes|[KMGTPE]i?B)", re.IGNORECASE)
_SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "not enough memory")
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SHARED = (
    "share the model with --tensor-model-parallel-size, --pipeline-model-parallel-size or --use-distributed-optimizer, "
    "or give --recompute-granularity full"
)
_ADVICE = {
    "train": "lower --micro-batch-size, --max-tokens-per-microbatch, --matching-tokens-per-microbatch or --seq-length, "
    + _SHARED,
    "gfpo": f"lower --micro-batch-size, --max-tokens-per-microbatch or --seq-length, {_SHARED}",
    "convert": "share the model with --tensor-model-parallel-size or --pipeline-model-parallel-size",
    "generate": "lower --batch-size or --max-new-tokens, or choose a smaller model",
}
"""Command -> which flags lower its need."""
_OTHERWISE = "free memory, or give less input at a time"


@contextlib.contextmanager
def enough_memory(command: str) -> Iterator[None]:
    """Turn an error about memory inside the `with` block into a UserError: how much was wanted, which flags lower it.

    That of Python, numpy, torch and C++; others pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        found = _WANTED.search(str(error))
        wanted = f" for {_amount(found)} at once" if found else ""
        raise UserError(f"not enough memory{wanted}; {_ADVICE.get(command, _OTHERWISE)}") from error


def _lacks_memory(error: BaseException) -> bool:
    """RuntimeError is what torch raises, on the GPU a subclass of it."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def _amount(found: re.Match[str]) -> str:
    """The amount as it was said, bytes in larger units."""
    if found[2].lower() != "bytes":
        return f"{found[1]} {found[2]}"
    size, unit = float(found[1]), "bytes"
    for larger in _UNITS:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
