"""Which checkpoint of a run is loaded: the newest, or by --on-damaged-checkpoint the newest that is not damaged."""

from __future__ import annotations

from pathlib import Path

from msgspec import UNSET

from megatron_ssft.config import CheckpointConfig
from megatron_ssft.errors import UserError, shared_error
from megatron_ssft.formats.manifest import MANIFEST, Manifest, find_wrong_content, find_wrong_size, read_manifest
from megatron_ssft.formats.run_folder import REMOVE_ADVICE, STATE, checkpoint_folder, checkpoints_from_newest
from megatron_ssft.formats.train_state import read_train_state
from megatron_ssft.parallel.checkpoint.pickle_scan import refuse_unusable
from megatron_ssft.parallel.collectives import gather_json, on_first_rank
from megatron_ssft.parallel.topology import Topology


def choose_checkpoint(run: Path, checkpoint: CheckpointConfig, topology: Topology) -> int:
    """Iteration of the checkpoint to load, compared with its manifest. Collective; says what was passed over.

    Raises:
        UserError: there is none, or a damaged one may not be passed over; the file is named.
    """
    candidates = on_first_rank(lambda: checkpoints_from_newest(run), topology)
    for iteration in candidates:
        folder = checkpoint_folder(run, iteration)
        damage = find_damage(folder, topology, by_content=checkpoint.verify_checkpoint)
        if damage is None:
            if iteration != candidates[0]:
                _say(f"going on from {folder}, the newest checkpoint that is not damaged", topology)
            return iteration
        if checkpoint.on_damaged_checkpoint == "refuse":
            older = ", or pass --on-damaged-checkpoint older" if damage.endswith(REMOVE_ADVICE) else ""
            raise shared_error(damage + older)
        _say(f"{damage.removesuffix(f'; {REMOVE_ADVICE}')}; passed over (--on-damaged-checkpoint older)", topology)
    raise shared_error(f"--load {run}: every checkpoint is damaged; start afresh with another --save")


def find_damage(folder: Path, topology: Topology, *, by_content: bool) -> str | None:
    """What is wrong with a checkpoint, as a line for a user; the same on every rank. Collective.

    Args:
        by_content: hash every file, shared out over the ranks; otherwise names, sizes and structure are looked at.
    """
    damage: str | None = on_first_rank(lambda: _outer_damage(folder), topology)
    if damage is None and by_content:
        damage = next((found for found in gather_json(_own_damage(folder, topology), topology) if found), None)
    if damage is None:
        damage = on_first_rank(lambda: _structural_damage(folder), topology)
    return damage


def _outer_damage(folder: Path) -> str | None:
    """What names, sizes, state and manifest tell."""
    try:
        state = read_train_state(folder / STATE)
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    if checkpoint_folder(folder.parent, state.iteration) != folder:
        return f"{folder / STATE}: is of iteration {state.iteration}; {REMOVE_ADVICE}"
    if manifest is not None:
        return find_wrong_size(folder, manifest) or _unlisted(folder, manifest)
    if state.has_manifest is UNSET:
        print(
            f"{folder}: has no checksums (saved by an older version); damage to its numbers cannot be seen", flush=True
        )
        return None
    return f"{folder / MANIFEST}: missing; {REMOVE_ADVICE}"


def _unlisted(folder: Path, manifest: Manifest) -> str | None:
    """A manifest that does not cover what is read vouches for nothing."""
    needed = [path.name for path in folder.iterdir() if path.suffix == ".distcp" or path.name in (STATE, ".metadata")]
    absent = next((name for name in needed if name not in manifest.files), None)
    return None if absent is None else f"{folder / MANIFEST}: damaged: does not list {absent}; {REMOVE_ADVICE}"


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


def _say(text: str, topology: Topology) -> None:
    if topology.is_first_rank:
        print(text, flush=True)
