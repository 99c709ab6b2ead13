"""Which checkpoint of a run is loaded: the newest, or by --on-damaged-checkpoint the newest that is not damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ssft.config import CheckpointConfig
from megatron_ssft.errors import DamagedCheckpoint, UserError
from megatron_ssft.formats.checkpoint_damage import first_sound, outer_damage, pass_over
from megatron_ssft.formats.manifest import find_wrong_content, read_manifest
from megatron_ssft.formats.read_mark import reading
from megatron_ssft.formats.run_folder import checkpoints_from_newest
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_unusable
from megatron_ssft.parallel.collectives import gather_json, on_first_rank
from megatron_ssft.parallel.topology import Topology

T = TypeVar("T")


class CheckpointChoice:
    """The checkpoints that one start takes of its runs, each looked at once. Collective throughout.

    In a `with` block no mark on a run is left behind, also by a start that is refused.
    """

    def __init__(self, checkpoint: CheckpointConfig, topology: Topology) -> None:
        self._checkpoint = checkpoint
        self._topology = topology
        self._candidates: dict[Path, list[int]] = {}
        """Of a run, from the newest; those that were passed over are left out."""
        self._chosen: dict[Path, int] = {}
        self._marks = contextlib.ExitStack()
        """On runs that another job may be writing, from the choice to the end of the loading."""

    def __enter__(self) -> CheckpointChoice:
        return self

    def __exit__(self, *_: object) -> None:
        self._marks.close()

    def _begin_reading(self, run: Path) -> None:
        save = self._checkpoint.save
        if self._topology.is_first_rank and not (save is not None and Path(save).resolve() == run.resolve()):
            self._marks.enter_context(reading(run))

    def of(self, run: Path) -> int:
        """Iteration of the checkpoint to load, compared with its manifest; says what was passed over.

        Raises:
            UserError: there is none, or a damaged one may not be passed over; the file is named.
        """
        if run not in self._chosen:
            is_first_look = run not in self._candidates
            if is_first_look:
                self._begin_reading(run)
                self._candidates[run] = on_first_rank(lambda: checkpoints_from_newest(run), self._topology)
            self._chosen[run] = first_sound(
                run,
                self._candidates[run],
                lambda folder: find_damage(folder, self._topology, by_content=self._checkpoint.verify_checkpoint),
                may_pass_over=self._may_pass_over,
                say=self._say,
                damaged_before=not is_first_look,
            )
        return self._chosen[run]

    def taken_of(self, run: Path) -> int | None:
        """The iteration that was chosen for a run; None: none was looked at."""
        return self._chosen.get(run)

    def load(self, run: Path, work: Callable[[int], T]) -> T:
        """The result of `work`, which loads the chosen checkpoint; repeated with an older one where that is damaged.

        What no checksum tells, such as NaN that was saved, is found only while it is loaded. Raises UserError.
        """
        with self._marks:
            while True:
                iteration = self.of(run)
                try:
                    return work(iteration)
                except DamagedCheckpoint as error:  # on all ranks alike
                    pass_over(str(error), may_pass_over=self._may_pass_over, say=self._say)
                    del self._chosen[run]
                    self._candidates[run] = [older for older in self._candidates[run] if older < iteration]

    @property
    def _may_pass_over(self) -> bool:
        return self._checkpoint.on_damaged_checkpoint == "older"

    def _say(self, text: str) -> None:
        if self._topology.is_first_rank:
            print(text, flush=True)


def find_damage(folder: Path, topology: Topology, *, by_content: bool) -> str | None:
    """What is wrong with a checkpoint, as a line for a user; the same on every rank. Collective.

    Args:
        by_content: hash every file, shared out over the ranks; otherwise names, sizes and structure are looked at.
    """
    damage: str | None = on_first_rank(lambda: outer_damage(folder, _print), topology)
    if damage is None and by_content:
        damage = next((found for found in gather_json(_own_damage(folder, topology), topology) if found), None)
    if damage is None:
        damage = on_first_rank(lambda: _structural_damage(folder), topology)
    return damage


def _own_damage(folder: Path, topology: Topology) -> str | None:
    """What this rank finds in its share of the files: every so many-th by size."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    if manifest is None:
        return None
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    return find_wrong_content(folder, manifest, names[topology.rank :: topology.world_size])


def _structural_damage(folder: Path) -> str | None:
    try:
        refuse_unusable(folder)
    except UserError as error:
        return str(error)
    return None


def _print(text: str) -> None:
    print(text, flush=True)
