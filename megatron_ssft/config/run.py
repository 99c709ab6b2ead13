"""What a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ssft.config.checks import choice, only_where, positive, require
from megatron_ssft.config.fields import PathText


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    save: PathText | None = None
    """Folder of the run: checkpoints, metrics, assignments, resolved configuration."""
    load: PathText | None = None
    """Folder of a run to continue (with the same --save its logs go on where the checkpoint was taken), or a Hugging
    Face folder to start from."""
    origin: PathText | None = None
    """Folder that the run's weights came from. A run writes it into its config.yaml, which starts there again where no
    --load is given."""
    origin_fingerprint: str | None = None
    """What the weights in --origin must be; a run writes it into its config.yaml."""
    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its sha256 before it is loaded."""
    on_damaged_checkpoint: Literal["refuse", "older"] = "refuse"
    """What becomes of a start from a run whose newest checkpoint is damaged: it is refused, or goes on from the newest
    one that is not."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    keep_last: int | None = None
    """Keep this many of the newest good checkpoints and remove older ones, each time that a new one is complete;
    default: all stay."""
    keep_every: int | None = None
    """With --keep-last: checkpoints of steps that are multiples of this stay as well."""
    save_optim: bool = True
    """--no-save-optim: checkpoints hold the weights alone, a seventh in bf16. The one of a SIGTERM holds the optimizer
    all the same, as the run is to go on from it."""
    load_optim: bool = True
    """--no-load-optim: a run that goes on does so with a new optimizer. Needed where the checkpoint holds none."""
    async_save: bool = False
    """Train on while a checkpoint is written from a copy in host memory."""
    export_hf_at_save: bool = False
    """With every checkpoint write a Hugging Face folder too (hf in the checkpoint's folder)."""
    verify_hf: bool = True
    """Compare every --export-hf-at-save with the checkpoint, tensor by tensor, and its logits with transformers."""

    def __post_init__(self) -> None:
        positive(self, "save_interval", "keep_last", "keep_every")
        only_where(self, self.origin is not None, "without --origin", "origin_fingerprint")
        for name in ("save_interval", "keep_last"):
            flag = name.replace("_", "-")
            require(getattr(self, name) is None or self.save is not None, f"--{flag} needs --save")
        self._check_kept()
        only_where(self, self.save is not None, "without --save", "save_optim", "async_save")
        require(
            not (self.async_save and self.export_hf_at_save),
            "--export-hf-at-save does not go with --async-save: an export stops the training for longer than the save "
            "that it would follow; leave one of them out (megatron-ssft convert export writes it afterwards)",
        )
        choice(self.on_damaged_checkpoint, "on-damaged-checkpoint", "refuse", "older")
        only_where(
            self, self.load is not None, "without --load", "verify_checkpoint", "on_damaged_checkpoint", "load_optim"
        )
        only_where(self, self.export_hf_at_save, "without --export-hf-at-save", "verify_hf")
        require(not self.export_hf_at_save or self.save is not None, "--export-hf-at-save needs --save")

    def _check_kept(self) -> None:
        """Raise UserError for steps that would never be kept, or are kept anyway."""
        if self.keep_every is None:
            return
        require(self.keep_last is not None, "--keep-every has no use without --keep-last: every checkpoint stays")
        require(
            self.save_interval is not None and self.keep_every % self.save_interval == 0,
            f"--keep-every {self.keep_every} must be a multiple of --save-interval {self.save_interval}: at other "
            "steps there is no checkpoint",
        )

    @property
    def continues_in_place(self) -> bool:
        """Whether --load and --save name the same folder."""
        if self.save is None or self.load is None:
            return False
        return Path(self.load).resolve() == Path(self.save).resolve()


@dataclass
class LoggingConfig:
    """What is written while training."""

    gpu_peak_tflops: float | None = None
    """Peak TFLOP/s of one GPU, to log model FLOPs utilisation by; default: known for common GPUs with --bf16."""
    log_dir: PathText | None = None
    """Folder for a log of each rank, rankN.log, with all that it prints; the console then shows the first rank, and of
    others their errors and warnings. Default: everything on the console."""
    tensorboard_dir: PathText | None = None
    """TensorBoard folder; default: tensorboard in the --save folder."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too; WANDB_MODE=offline in the environment does so without a connection."""
    wandb_exp_name: str | None = None
    """Name of the run there."""

    def __post_init__(self) -> None:
        positive(self, "gpu_peak_tflops")
        only_where(self, self.wandb_project is not None, "without --wandb-project", "wandb_exp_name")
