"""Convert between Hugging Face folders and Megatron checkpoints, and prove that they are the same model.

    megatron-ssft convert import HF_DIR MEGATRON_DIR --num-forking-tokens 6
    torchrun --nproc-per-node 4 -m megatron_ssft.cli convert export MEGATRON_DIR HF_DIR \\
        --tensor-model-parallel-size 4
    megatron-ssft convert verify HF_DIR MEGATRON_DIR

Alone or under torchrun, at any parallel layout. MEGATRON_DIR is a run folder: `train --load` takes it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from megatron_ssft.cli.options import parse_action
from megatron_ssft.config.checks import only_where
from megatron_ssft.config.fields import Flag


@dataclass(frozen=True, kw_only=True)
class LayoutFlags:
    """The parallel layout that the program is started in, and its device."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share a layer; default 1."""
    pipeline_model_parallel_size: int | None = None
    """Stages of layers; default 1."""
    device: Annotated[str | None, Flag(choices=("auto", "cuda", "cpu"))] = None
    """Where the model stands, as for `train`; default auto."""

    def options(self) -> dict[str, object]:
        """Configuration values that were given, by name, without the folders."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in values.items() if k not in ("source", "target") and v is not None}


@dataclass(frozen=True, kw_only=True)
class LoadFlags(LayoutFlags):
    """How the checkpoint of a run is chosen."""

    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its sha256 before it is loaded."""
    on_damaged_checkpoint: Literal["refuse", "older"] = "refuse"
    """What becomes of a run whose newest checkpoint is damaged, as for `train`."""


@dataclass(frozen=True, kw_only=True)
class ImportFlags(LayoutFlags):
    """Make a run folder, with a checkpoint of weights only, from a Hugging Face folder."""

    source: Annotated[Path, Flag(metavar="HF_DIR", positional=True)]
    """Folder to read."""
    target: Annotated[Path, Flag(metavar="MEGATRON_DIR", positional=True)]
    """Run folder to make."""
    no_verify: bool = False
    """Do not compare with transformers."""
    num_forking_tokens: int | None = None
    """Tags that the model gets; default 0."""
    forking_token_format: str | None = None
    """special or text."""
    forking_token_template: str | None = None
    """Text of a tag; {i} stands for its number."""
    forking_token_init: str | None = None
    """First values of the tags' rows, as for `train`."""
    forking_token_noise: float | None = None
    """Size of their noise, as for `train`."""
    seed: int | None = None
    """Decides that noise."""

    def __post_init__(self) -> None:
        tags = ("forking_token_format", "forking_token_template", "forking_token_init", "forking_token_noise")
        only_where(self, bool(self.num_forking_tokens), "without --num-forking-tokens", *tags)
        text = self.forking_token_format == "text"
        here = "with --forking-token-format text: such tags have no rows of their own"
        only_where(self, not text, here, "forking_token_init", "forking_token_noise")
        mean = self.forking_token_init == "mean"
        only_where(self, not mean, "with --forking-token-init mean", "forking_token_noise")


@dataclass(frozen=True, kw_only=True)
class ExportFlags(LoadFlags):
    """Write the newest checkpoint of a run folder as a Hugging Face folder."""

    source: Annotated[Path, Flag(metavar="MEGATRON_DIR", positional=True)]
    """Run folder to read."""
    target: Annotated[Path, Flag(metavar="HF_DIR", positional=True)]
    """Folder to make."""
    no_verify: bool = False
    """Do not compare with transformers."""


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(LoadFlags):
    """Check that a Hugging Face folder and the newest checkpoint of a run folder are the same model."""

    source: Annotated[Path, Flag(metavar="HF_DIR", positional=True)]
    """Hugging Face folder."""
    target: Annotated[Path, Flag(metavar="MEGATRON_DIR", positional=True)]
    """Run folder."""


ACTIONS: dict[str, type[ImportFlags | ExportFlags | VerifyFlags]] = {
    "import": ImportFlags,
    "export": ExportFlags,
    "verify": VerifyFlags,
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, convert, close. Raises UserError."""
    flags = parse_action(ACTIONS, __doc__, argv, prog)
    from megatron_ssft.parallel.topology import explaining
    from megatron_ssft.training import conversion

    with explaining():
        match flags:
            case ImportFlags():
                conversion.import_hf(flags.source, flags.target, flags.options())
            case ExportFlags():
                conversion.export_run(flags.source, flags.target, flags.options())
            case VerifyFlags():
                conversion.verify(flags.source, flags.target, flags.options())
