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
    export_hf_at_save: bool = False
    """With every checkpoint write a Hugging Face folder too (hf in the checkpoint's folder)."""
    verify_hf: bool = True
    """Compare every --export-hf-at-save with the checkpoint, tensor by tensor, and its logits with transformers."""

    def __post_init__(self) -> None:
        positive(self, "save_interval")
        only_where(self, self.origin is not None, "without --origin", "origin_fingerprint")
        require(self.save_interval is None or self.save is not None, "--save-interval needs --save")
        choice(self.on_damaged_checkpoint, "on-damaged-checkpoint", "refuse", "older")
        only_where(self, self.load is not None, "without --load", "verify_checkpoint", "on_damaged_checkpoint")
        only_where(self, self.export_hf_at_save, "without --export-hf-at-save", "verify_hf")
        require(not self.export_hf_at_save or self.save is not None, "--export-hf-at-save needs --save")

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
    tensorboard_dir: PathText | None = None
    """TensorBoard folder; default: tensorboard in the --save folder."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too; WANDB_MODE=offline in the environment does so without a connection."""
    wandb_exp_name: str | None = None
    """Name of the run there."""

    def __post_init__(self) -> None:
        positive(self, "gpu_peak_tflops")
        only_where(self, self.wandb_project is not None, "without --wandb-project", "wandb_exp_name")
