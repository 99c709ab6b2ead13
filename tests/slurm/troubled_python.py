"""A Python that runs a program on bad days: slow steps, a last save without end, a rank that dies, a slow way out.

`TROUBLED_PYTHON` is a PYTHON= for the batch scripts. Environment:
  STEP_SECONDS    seconds that every step takes longer
  IMPORT_SECONDS  seconds before the first import
  EXIT_SECONDS    seconds that it stays when all is done
  HANG_ONCE       file: the save of the first stop never ends; the file tells that it was tried
  DIE_AT          step before which rank 1 is killed
  DIE_TIMES       how often, at most; counted in the file DIED
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from tests.helpers.paths import ROOT


def write_interpreter(folder: Path) -> Path:
    """A program that takes the place of `python`."""
    program = folder / "troubled-python"
    program.write_text(
        f'#!/usr/bin/env bash\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.slurm.troubled_python "$@"\n'
    )
    program.chmod(0o755)
    return program


def _trouble() -> None:
    time.sleep(float(os.environ.get("IMPORT_SECONDS", 0)))
    from megatron_ssft.training.saving import Saver
    from megatron_ssft.training.trainer import Trainer

    advance, end = Trainer._advance, Saver.end

    def troubled_advance(trainer, log):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        if trainer.iteration + 1 == int(os.environ.get("DIE_AT", 0)) and os.environ["SLURM_PROCID"] == "1":
            died = Path(os.environ["DIED"])
            times = len(died.read_text()) if died.exists() else 0
            if times < int(os.environ["DIE_TIMES"]):
                died.write_text("x" * (times + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        advance(trainer, log)

    def troubled_end(saver, iteration, state, *, is_stopped):
        mark = Path(os.environ["HANG_ONCE"]) if is_stopped and "HANG_ONCE" in os.environ else None
        if mark is not None and not mark.exists():
            if os.environ["SLURM_PROCID"] == "0":
                mark.touch()
            time.sleep(600)
        end(saver, iteration, state, is_stopped=is_stopped)

    Trainer._advance, Saver.end = troubled_advance, troubled_end


if __name__ == "__main__":
    _trouble()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as at every interpreter's end
        time.sleep(float(os.environ.get("EXIT_SECONDS", 0)))
