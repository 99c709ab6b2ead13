"""Where a run's weights come from: said first, recorded in its config.yaml, and checked when that is used again."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.config import CheckpointConfig, RunConfig, TrainingRun
from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import ASSETS, checkpoint_folder, find_latest
from megatron_ssft.hf.fingerprints import model_fingerprint
from megatron_ssft.hf.folder import is_hf_folder

_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Origin:
    """The folder that weights were taken from."""

    folder: str | None
    """None: they were drawn."""
    fingerprint: str | None
    """sha256 in hexadecimal digits; None where it was not asked for."""


def fingerprint_of(folder: Path) -> str:
    """sha256 of the weights that `--load` takes from a folder. Raises UserError.

    Of a Hugging Face folder all of them are read. Of a run it is that of its newest checkpoint.
    """
    if is_hf_folder(folder):
        return model_fingerprint(folder)
    return checkpoint_fingerprint(checkpoint_folder(folder, find_latest(folder)))


def checkpoint_fingerprint(folder: Path) -> str:
    """sha256 over the name, size, first and last MiB of every file of a checkpoint, its export left out.

    That tells checkpoints apart in no time, since every step changes every tensor. It is no proof against damage.
    """
    digest = hashlib.sha256(folder.name.encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if path.relative_to(folder).parts[0] == ASSETS:
            continue
        size = path.stat().st_size
        digest.update(f"\0{path.relative_to(folder)} {size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


class BackgroundFingerprint:
    """`fingerprint_of` a folder, found out while the run builds its model and reads the same files."""

    def __init__(self, folder: Path) -> None:
        """Start."""
        self._folder = folder
        self._outcome: str | Exception | None = None
        # A daemon: a start that is refused meanwhile ends at once.
        self._thread = threading.Thread(target=self._find, name="fingerprint", daemon=True)
        self._thread.start()

    def _find(self) -> None:
        try:
            self._outcome = fingerprint_of(self._folder)
        except (UserError, OSError) as error:  # raised again where the result is asked for
            self._outcome = error

    def result(self) -> str:
        """The fingerprint, once it is there. Raises UserError and OSError."""
        self._thread.join()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None, "the thread died"
        return self._outcome


def starts_at_recorded_origin(checkpoint: CheckpointConfig) -> bool:
    """Whether the run is to begin with the very weights that its configuration records."""
    return checkpoint.origin_fingerprint is not None and checkpoint.load == checkpoint.origin


def check_origin(checkpoint: CheckpointConfig) -> None:
    """Raise UserError where the weights that a configuration records are others by now. Takes as long as reading."""
    if not starts_at_recorded_origin(checkpoint):
        return
    assert checkpoint.origin is not None
    fingerprint = fingerprint_of(Path(checkpoint.origin))
    if fingerprint != checkpoint.origin_fingerprint:
        raise UserError(
            f"--origin {checkpoint.origin}: holds other weights (fingerprint {fingerprint[:12]}) than this "
            f"configuration began with ({str(checkpoint.origin_fingerprint)[:12]}); put those back, or take these with "
            f"--load {checkpoint.origin}"
        )


def origin_line(
    run: RunConfig, resumed_at: int | None, taken: int | None = None, fingerprint: str | None = None
) -> str:
    """The first line of the log: where the weights come from.

    Args:
        resumed_at: the step of the checkpoint that the run goes on from; None: it begins.
        taken: the step of the checkpoint that a beginning run takes the weights of; None: the newest of --load.
        fingerprint: of the weights that a beginning run takes, where it is known.
    """
    load = run.checkpoint.load
    if load is None:
        return f"weights: random, drawn by --seed {run.training.seed}"
    folder = Path(load)
    if resumed_at is not None:
        return f"weights: resumed from {checkpoint_folder(folder, resumed_at)}"
    mark = "" if fingerprint is None else f" (fingerprint {fingerprint[:12]})"
    if is_hf_folder(folder):
        return f"weights: from the Hugging Face folder {folder}{mark}"
    step = find_latest(folder) if taken is None else taken
    return f"weights: from the checkpoint {checkpoint_folder(folder, step)}{mark}"


class OriginOfRun:
    """The origin of the weights of one run, from its start on. Only the first rank has one."""

    def __init__(self, config: TrainingRun) -> None:
        """Check what the configuration records, and begin to find out what it is to record. Raises UserError."""
        self._run = config.run
        checkpoint = config.run.checkpoint
        check_origin(checkpoint)
        self._pending: BackgroundFingerprint | None = None
        if checkpoint.load is None or checkpoint.save is None or starts_at_recorded_origin(checkpoint):
            return
        if is_hf_folder(Path(checkpoint.load)):
            self._pending = BackgroundFingerprint(Path(checkpoint.load))

    def find(self, resumed_at: int | None, taken: int | None) -> Origin:
        """The origin: that of the run that goes on, or the folder that the weights were taken from. Raises UserError.

        Args:
            resumed_at: the step of the checkpoint that the run goes on from; None: it begins.
            taken: the step of the checkpoint that it takes the weights of; None: --load is no run.
        """
        checkpoint = self._run.checkpoint
        if resumed_at is not None or checkpoint.load is None or starts_at_recorded_origin(checkpoint):
            return Origin(checkpoint.origin, checkpoint.origin_fingerprint)
        if self._pending is not None:
            return Origin(checkpoint.load, self._pending.result())
        if checkpoint.save is None:
            return Origin(checkpoint.load, None)
        assert taken is not None, "--load is a run, whose checkpoint was chosen"
        return Origin(checkpoint.load, checkpoint_fingerprint(checkpoint_folder(Path(checkpoint.load), taken)))
