"""Run a command to its exit status: 0 when done, 2 with one clear line when the input is at fault.

75 means that another rank was lost, and the same command may go well another time.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable

from megatron_ssft.errors import LostRank, UserError, is_full_disk, reason_of
from megatron_ssft.launch import rank_for_messages

GRACE_SECONDS = 3.0

_NOTICES = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "The .grad attribute of a Tensor that is not a leaf",  # megatron-core's distributed optimizer on the CPU
    "Please use DTensor instead",  # torch's own checkpoint format, which megatron-core builds on
    "`load_state_dict` is deprecated",
    "`torch.distributed.(reduce_scatter|all_gather)",
    "full scope is deprecated",
    "The next bucket's parameter all-gather",  # the rows of tags are used before their bucket's turn
    r"\w+ is experimental and still under active development",  # megatron-core 0.19, of models that are not used
)
_LOGGED_NOTICES = {"megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED"}  # megatron-core 0.19


def run_command(main: Callable[[], int | None]) -> int:
    """Run `main` and return its status, by default 0; print a UserError as one line, without a traceback.

    So does a full disk, wherever it is noticed. Other exceptions are bugs and pass.
    """
    _quiet_libraries()
    try:
        return main() or 0
    except UserError as error:
        _report(error)
        return error.status
    except OSError as error:
        if not is_full_disk(error):
            raise
        _report(
            UserError(f"{error.filename or 'a file'}: cannot be written: {reason_of(error)}; make room and start again")
        )
        return 2


def _report(error: UserError) -> None:
    """Print on the first rank; on another only if it seems to be alone with its error.

    Most errors meet all ranks, and the launcher ends the others as soon as the first has spoken. A rank that is still
    there after a while (say, the one node without the tokenizer's folder) must say itself what is wrong. Of a lost rank
    the watch may have told already.
    """
    rank = rank_for_messages()
    if isinstance(error, LostRank) and error.is_told:
        return
    if rank == 0:
        with contextlib.suppress(OSError):  # a full disk may be what the error is about
            sys.stdout.flush()
        print(error, file=sys.stderr, flush=True)
    elif not error.shared:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
        print(f"[rank {rank}] {error}", file=sys.stderr, flush=True)


def _quiet_libraries() -> None:
    """Silence the libraries' notices that nobody can act on."""
    for text in _NOTICES:
        warnings.filterwarnings("ignore", message=text)
    for logger, text in _LOGGED_NOTICES.items():
        logging.getLogger(logger).addFilter(_other_than(text))


def _other_than(text: str) -> Callable[[logging.LogRecord], bool]:
    """A filter that drops messages that begin so."""
    return lambda record: not record.getMessage().startswith(text)
