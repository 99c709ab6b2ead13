"""Seeded damage to the files of a folder, as disks, copies and people make it, and bodies that try to load the rest."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from megatron_ssft.errors import UserError
from tests.helpers.checkpoints import build, resume

BLOCK = 512
"""Bytes that a disk loses at once."""


def damage(folder, number):
    """Damage `number` of the campaign, done to a folder; says what was done.

    Every file in turn, every kind in turn; the places are drawn from the number.
    """
    draws = random.Random(number)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = files[number % len(files)]
    kinds = [_flip, _flip, _cut, _missing, _swap, _extend, _zero, _empty]
    kind = kinds[number // len(files) % len(kinds)]
    other = draws.choice([file for file in files if file != path])
    return f"{number}: {path.name}: {kind(path, draws, other)}"


def _flip(path, draws, other):
    content = bytearray(path.read_bytes())
    place, bit = draws.randrange(len(content)), draws.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def _cut(path, draws, other):
    content = path.read_bytes()
    keep = draws.randrange(len(content))
    path.write_bytes(content[:keep])
    return f"cut to {keep} of {len(content)} bytes"


def _missing(path, draws, other):
    path.unlink()
    return "missing"


def _swap(path, draws, other):
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return f"swapped with {other.name}"


def _extend(path, draws, other):
    path.write_bytes(path.read_bytes() + draws.randbytes(draws.choice((1, 7, 4096))))
    return "extended"


def _zero(path, draws, other):
    """A block of zeros where there was something else."""
    content = bytearray(path.read_bytes())
    blocks = [start for start in range(0, len(content), BLOCK) if any(content[start : start + BLOCK])]
    start = draws.choice(blocks)
    end = min(start + BLOCK, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"bytes {start} to {end} zeroed"


def _empty(path, draws, other):
    path.write_bytes(b"")
    return "empty"


def try_damages(values, run, iteration, numbers):
    """(what was done, what became of a resume) of damages; the run is rebuilt before each. A body for `run_ranks`."""
    trainer = build(values)
    checkpoint = Path(run) / f"iter_{iteration:07d}"
    sound = checkpoint.with_name("sound")
    shutil.copytree(checkpoint, sound)
    outcomes = []
    for number in numbers:
        shutil.rmtree(checkpoint)
        shutil.copytree(sound, checkpoint)
        done = damage(checkpoint, number)
        outcomes.append((done, outcome_of_resume(trainer, Path(run))))
    return outcomes


def outcome_of_resume(trainer, run):
    """`loaded`, `refused: ...`, or the name of what is no line for a user."""
    try:
        resume(trainer, run)
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - a traceback is what the test looks for
        return f"{type(error).__name__}: {error}"
    return "loaded"
