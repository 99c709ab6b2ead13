"""The one kind of pickle that is read here: a single string. Nothing is ever unpickled.

LiveCodeBench releases its hidden tests as base64 of zlib of the pickle of a JSON text. Loading a pickle runs whatever
its author put into it, so the opcodes are only looked at: all but those that spell one string are refused.
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib

from megatron_ssft.formats.jsonl import RowError

_STRINGS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_NEUTRAL = ("FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
"""They frame or store what was read; the opcodes that would look it up again are refused."""
_MAX_OPCODES = 16
MAX_BYTES = 1 << 30
"""Of a payload after decompression."""


def decode_payload(payload: str, what: str) -> str:
    """The text in base64(zlib(pickle(text))). Raises RowError, which calls the payload `what`."""
    try:
        compressed = base64.b64decode(payload, validate=True)
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(compressed, MAX_BYTES)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise RowError(f"{what} is neither JSON nor base64 of compressed data; fetch the file again") from error
    if decompressor.unconsumed_tail:
        raise RowError(f"{what} is larger than {MAX_BYTES >> 20} MiB when decompressed")
    if not decompressor.eof:
        raise RowError(f"{what} is cut off; fetch the file again")
    return read_string_pickle(data, what)


def read_string_pickle(data: bytes, what: str) -> str:
    """The string that `data` is a pickle of. Raises RowError for a pickle of anything else, without running it."""
    text, number = None, 0
    opcodes = pickletools.genops(data)
    while True:
        try:
            opcode, argument, place = next(opcodes)
        except ValueError as error:
            raise RowError(f"{what} is no complete pickle; fetch the file again") from error
        if opcode.name == "STOP" and text is not None:
            assert place is not None, "genops knows the place in bytes"
            if place + 1 < len(data):
                raise RowError(f"{what} has data behind its end; fetch the file again")
            return text
        if opcode.name in _STRINGS and text is None:
            text = argument
        elif not (opcode.name in _NEUTRAL or (opcode.name == "PROTO" and number == 0)) or number > _MAX_OPCODES:
            raise RowError(
                f"{what} is a pickle of something else than one string (opcode {opcode.name}); loading such a file can "
                "run a program, so it is not read"
            )
        number += 1
