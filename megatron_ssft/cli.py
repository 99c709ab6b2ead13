"""How every program of the project ends: 0 when done, 2 with one clear line when the input is at fault."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from megatron_ssft.errors import UserError

_NOTICES = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "The .grad attribute of a Tensor that is not a leaf",  # megatron-core's distributed optimizer on the CPU
    "Please use DTensor instead",  # torch's own checkpoint format, which megatron-core builds on
    "`load_state_dict` is deprecated",
    "`torch.distributed.(reduce_scatter|all_gather)",
    "full scope is deprecated",
)


def run_command(main: Callable[[], None]) -> int:
    """Run `main`; print a UserError on the first rank, without a traceback. Other exceptions are bugs and pass."""
    _quiet_libraries()
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
            sys.stdout.flush()
            print(error, file=sys.stderr, flush=True)
        return 2
    return 0


def _quiet_libraries() -> None:
    """Silence import-time notices about optional packages that nobody can act on."""
    for text in _NOTICES:
        warnings.filterwarnings("ignore", message=text)
