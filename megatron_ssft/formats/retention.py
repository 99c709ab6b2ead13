"""Which checkpoints of a run stay (--keep-last, --keep-every), and the removal of the others."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ssft.formats.checkpoint_damage import outer_damage
from megatron_ssft.formats.files import sync_folder
from megatron_ssft.formats.read_mark import ReadMarks
from megatron_ssft.formats.run_folder import all_checkpoints, checkpoint_folder


@dataclass
class Removal:
    """What became of the checkpoints of a run."""

    removed: list[int] = field(default_factory=list)
    """Iterations, from the newest."""
    kept: list[int] = field(default_factory=list)
    """Those that stay, the newest first."""
    problem: str | None = None
    """Why some that should go are there all the same."""


class Retention:
    """Removes checkpoints of one run folder, for whoever holds its lease."""

    def __init__(self, run: Path, keep_last: int, keep_every: int | None) -> None:
        self._run = run
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._marks = ReadMarks(run)

    def thin(self, newest: int) -> Removal:
        """Remove what need not stay, once the checkpoint `newest` is complete. What fails is the outcome's `problem`.

        Nothing is removed where that one is damaged, so that a good one is always left. Later ones, which a run that
        went back left behind, are overwritten when it comes there, and stay until then.
        """
        damage = outer_damage(checkpoint_folder(self._run, newest), lambda text: None)
        if damage is not None:
            return Removal(problem=f"nothing is removed: {damage}")
        outcome = self._sort(newest)
        superfluous, outcome.removed = outcome.removed, []
        try:
            reader = self._marks.reader() if superfluous else None
            if reader is not None:
                outcome.problem = f"nothing is removed while {reader} reads"
                return outcome
            for iteration in superfluous:
                _remove(checkpoint_folder(self._run, iteration))
                outcome.removed.append(iteration)
        except OSError as error:  # no reason to end a training
            outcome.problem = f"{error.filename or self._run}: cannot be removed: {error.strerror or error}"
        return outcome

    def _sort(self, newest: int) -> Removal:
        """What is to be removed, and what stays; damaged ones do not count as kept, and go with those of their age."""
        outcome, good = Removal(kept=[newest]), 1
        for iteration in reversed(all_checkpoints(self._run)):
            if iteration >= newest:
                continue
            is_young = good < self._keep_last
            # An import is no checkpoint that the run could make again.
            stays = iteration == 0 or (self._keep_every is not None and iteration % self._keep_every == 0)
            if is_young and outer_damage(checkpoint_folder(self._run, iteration), lambda text: None) is None:
                good += 1
            (outcome.kept if is_young or stays else outcome.removed).append(iteration)
        return outcome


def _remove(folder: Path) -> None:
    """Remove a checkpoint: it loses its name at once, and a kill leaves what the next start removes. Raises OSError."""
    aside = folder.with_name(f".{folder.name}.removed.partial")
    if aside.exists():  # could not be removed before
        shutil.rmtree(aside)
    os.rename(folder, aside)
    sync_folder(folder.parent)
    shutil.rmtree(aside)
