"""A program's main in this process, with what it writes down to the file descriptors."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable


def run_captured(main: Callable[[], int]) -> tuple[object, str, str]:
    """(status, stdout, stderr) as a shell would see them."""
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status: object = main()
        except SystemExit as end:
            status = end.code
        except BaseException:  # noqa: BLE001 - what the interpreter would print, for the test to show
            status = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), kept):
                os.dup2(descriptor, number)
                os.close(descriptor)
        stdout, stderr = (os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err))
    return status, stdout, stderr
