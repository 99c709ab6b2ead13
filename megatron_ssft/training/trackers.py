"""TensorBoard and Weights & Biases: checked before the model is built, opened with the log."""

from __future__ import annotations

import importlib.util
import secrets
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_ssft.config import LoggingConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import write_durably

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TENSORBOARD_HOOK = "but_for_tensorboard"
WANDB_ID = "wandb_run_id.txt"
"""In a run's folder: by what W&B knows the run."""


class WandbRun(Protocol):
    """The part of W&B's run that is used; the package is optional and has no stubs here."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


def missing_trackers(logging: LoggingConfig, save: str | None) -> list[str]:
    """One refusal per tracker that is asked for and whose package is not installed."""
    missing = []
    if logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        missing.append(
            "--wandb-project: the package wandb is not installed; pip install 'megatron-ssft[wandb]', or leave the "
            "flag out"
        )
    if (logging.tensorboard_dir or save) and importlib.util.find_spec("tensorboard") is None:
        missing.append("the package tensorboard is not installed; pip install tensorboard")
    return missing


def check_trackers(logging: LoggingConfig, save: str | None) -> None:
    """Raise UserError where a tracker cannot be used: its package is missing, or its folder cannot be written."""
    for text in missing_trackers(logging, save):
        raise UserError(text)
    if logging.tensorboard_dir is not None:
        folder = Path(logging.tensorboard_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            raise UserError(
                f"--tensorboard-dir {logging.tensorboard_dir}: cannot be written: {error.strerror}; name another folder"
            ) from error


def open_tensorboard(folder: Path | None, logging: LoggingConfig, first_iteration: int) -> SummaryWriter | None:
    """The writer, None without a folder. Raises OSError."""
    target = logging.tensorboard_dir or (folder and str(folder / "tensorboard"))
    if not target:
        return None
    from torch.utils.tensorboard import SummaryWriter

    _quiet_writer_threads()
    return SummaryWriter(target, purge_step=first_iteration)


def _quiet_writer_threads() -> None:
    """No traceback where TensorBoard's thread cannot write: it keeps the error, and raises it at the next value."""
    before = threading.excepthook
    if getattr(before, "__name__", "") == _TENSORBOARD_HOOK:
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(args.exc_value, OSError)):
            before(args)

    hook.__name__ = _TENSORBOARD_HOOK
    threading.excepthook = hook


def open_wandb(folder: Path | None, logging: LoggingConfig, first_iteration: int) -> WandbRun | None:
    """The run at W&B, None where it is not asked for. Raises UserError where W&B refuses, OSError."""
    if not logging.wandb_project:
        return None
    import wandb

    run_id = None if folder is None else run_id_of(folder, is_new=first_iteration == 1)
    try:
        run: WandbRun = wandb.init(
            project=logging.wandb_project, name=logging.wandb_exp_name, id=run_id, resume="allow"
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--wandb-project {logging.wandb_project}: {reason}; set WANDB_MODE=offline to log without a connection"
        ) from error
    return run


def run_id_of(folder: Path, *, is_new: bool) -> str:
    """By what W&B knows the run in this folder: drawn once, and kept with it wherever it is moved. Raises OSError.

    `is_new`: the run begins, so it is another one than whatever stood in the folder.
    """
    path = folder / WANDB_ID
    stored = path.read_text(encoding="utf-8").strip() if path.is_file() and not is_new else ""
    if not stored:
        stored = secrets.token_hex(8)
        write_durably(path, stored + "\n")
    return stored
