"""A one-dimensional `.npy` file that is read piece by piece.

Mapped memory would do, but whoever touches it after the file was cut is killed by SIGBUS. A read that comes short is an
error with a message.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron_ssft.errors import UserError


class ArrayFile:
    """An open file; it stays readable where another one takes its name, or it is deleted."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        """Open and check the header. Raises OSError, ValueError."""
        self._path = path
        self._dtype = dtype
        self._file = open(path, "rb")  # noqa: SIM115 - for the length of the run
        try:
            version = np.lib.format.read_magic(self._file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, _, stored = np.lib.format.read_array_header_1_0(self._file)
            if stored != dtype or len(shape) != 1:
                raise ValueError(f"{stored} {shape}")
            self._length = int(shape[0])
            self._begin = self._file.tell()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, end: int) -> np.ndarray:
        """The items `first` to `end` - 1, read-only. Raises UserError where the file has become shorter."""
        size = (end - first) * self._dtype.itemsize
        parts, position = [], self._begin + first * self._dtype.itemsize
        while size > 0:
            try:
                part = os.pread(self._file.fileno(), size, position)
            except OSError as error:
                raise UserError(f"{self._path}: cannot be read any more: {error.strerror}; start again") from error
            if not part:
                raise UserError(
                    f"{self._path}: was cut while it was in use, {size} bytes are missing; delete its folder and start "
                    "again with --load, it is made anew"
                )
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self._dtype)

    def read_all(self) -> np.ndarray:
        """All items, read-only."""
        return self.read(0, self._length)
