"""Damage to a checkpoint as its files show it, and the choice of the newest checkpoint without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import UNSET

from megatron_ssft.errors import UserError, shared_error
from megatron_ssft.formats.manifest import MANIFEST, Manifest, find_wrong_content, find_wrong_size, read_manifest
from megatron_ssft.formats.run_folder import REMOVE_ADVICE, STATE, checkpoint_folder, checkpoints_from_newest
from megatron_ssft.formats.train_state import read_train_state

OLDER_ADVICE = ", or pass --on-damaged-checkpoint older"


def sound_checkpoint(run: Path, *, by_content: bool, may_pass_over: bool, say: Callable[[str], None]) -> int:
    """Iteration of the checkpoint that a training would take of a run, found out by one process. Raises UserError.

    Args:
        by_content: hash every file; otherwise names, sizes and state are looked at.
        may_pass_over: go on to an older one where the newest is damaged; otherwise that is refused.
        say: is told what was passed over.
    """

    def damage_of(folder: Path) -> str | None:
        damage = outer_damage(folder, say)
        if damage is None and by_content and (manifest := read_manifest(folder)) is not None:
            damage = find_wrong_content(folder, manifest, manifest.files)
        return damage

    return first_sound(run, checkpoints_from_newest(run), damage_of, may_pass_over=may_pass_over, say=say)


def first_sound(
    run: Path,
    candidates: Sequence[int],
    damage_of: Callable[[Path], str | None],
    *,
    may_pass_over: bool,
    say: Callable[[str], None],
    damaged_before: bool = False,
) -> int:
    """The first of these iterations whose checkpoint has no damage. Raises UserError, in a job on every rank.

    Args:
        damage_of: what is wrong with a checkpoint, as a line for a user; the same on every rank.
        damaged_before: a newer one than these was passed over already.
    """
    for iteration in candidates:
        folder = checkpoint_folder(run, iteration)
        damage = damage_of(folder)
        if damage is None:
            if damaged_before or iteration != candidates[0]:
                say(f"going on from {folder}, the newest checkpoint that is not damaged")
            return iteration
        pass_over(damage, may_pass_over=may_pass_over, say=say)
    raise shared_error(f"--load {run}: every checkpoint is damaged; start afresh with another --save")


def pass_over(damage: str, *, may_pass_over: bool, say: Callable[[str], None]) -> None:
    """Say that a damaged checkpoint is passed over. Raises UserError where it may not be, in a job on every rank."""
    if not may_pass_over:
        raise shared_error(damage + (OLDER_ADVICE if damage.endswith(REMOVE_ADVICE) else ""))
    say(f"{damage.removesuffix(f'; {REMOVE_ADVICE}')}; passed over (--on-damaged-checkpoint older)")


def outer_damage(folder: Path, say: Callable[[str], None]) -> str | None:
    """What names, sizes, state and manifest tell of a checkpoint; None: nothing is wrong."""
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
        say(f"{folder}: has no checksums (saved by an older version); damage to its numbers cannot be seen")
        return None
    return f"{folder / MANIFEST}: missing; {REMOVE_ADVICE}"


def _unlisted(folder: Path, manifest: Manifest) -> str | None:
    """A manifest that does not cover what is read vouches for nothing."""
    needed = [path.name for path in folder.iterdir() if path.suffix == ".distcp" or path.name in (STATE, ".metadata")]
    absent = next((name for name in needed if name not in manifest.files), None)
    return None if absent is None else f"{folder / MANIFEST}: damaged: does not list {absent}; {REMOVE_ADVICE}"
