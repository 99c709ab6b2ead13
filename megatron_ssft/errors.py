"""The one exception type that is meant for the person who started the program."""

from __future__ import annotations

import errno

_NO_SPACE = "the disk is full"
_NO_QUOTA = "the disk quota is used up"


class UserError(ValueError):
    """Bad input: a wrong flag, a wrong data row, a damaged checkpoint.

    Its text is one line that says what is wrong and what to do, led by `file:line:` where a file is to blame.
    Entry points print it without a traceback and exit with status 2.
    """

    status: int = 2
    """Exit status of a program that ends by it."""
    shared: bool = False
    """Set where every rank of a job raises the same error at the same time; the first rank then speaks for all."""


class StillInUse(UserError):
    """What this job needs is held by the remains of itself. The input is not at fault."""

    status = 75
    """As LostRank's."""


class LostRank(UserError):
    """Another rank of the job is gone, or held it up for longer than it may. The input is not at fault."""

    status = 75
    """EX_TEMPFAIL of sysexits.h: the same command may go well another time."""
    is_told: bool = False
    """Whether a rank has said it, this one or another, so that the program is to end without a further word."""


class DamagedCheckpoint(UserError):
    """A checkpoint whose damage shows only while it is loaded. Every rank raises it together."""

    shared = True


def reason_of(error: OSError) -> str:
    """Why the operating system refused, the same words for a full disk everywhere."""
    return {errno.ENOSPC: _NO_SPACE, errno.EDQUOT: _NO_QUOTA}.get(error.errno or 0) or error.strerror or str(error)


def is_full_disk(error: OSError) -> bool:
    """Whether there is no room left, on the disk or in the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def shared_error(text: str, status: int = UserError.status) -> UserError:
    """A UserError that every rank raises together."""
    error = UserError(text)
    error.shared = True
    error.status = status
    return error
