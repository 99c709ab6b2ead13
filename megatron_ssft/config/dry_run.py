"""What --dry-run is asked beside the configuration: how a job of this size would go. No setting of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_ssft.config.checks import choice, only_where, positive, require
from megatron_ssft.config.fields import Flag
from megatron_ssft.config.gpus import GPUS, Gpu


@dataclass(frozen=True)
class DryRun:
    """With --dry-run: will the job fit, and how long will it take? Its heaviest step runs on simulated GPUs."""

    world_size: int | None = None
    """GPUs of the job. With --advise it may be left out: the fewest that hold the run are found."""
    gpu: Annotated[str | None, Flag(choices=tuple(GPUS))] = None
    """Whose memory and speed to compare with; without it bytes and FLOPs are counted only."""
    nodes_of: int = 8
    """GPUs of a node."""
    network_gbit: float | None = None
    """Gbit/s between nodes for each GPU; default: what the usual server of --gpu has."""
    attainable_share: float = 0.5
    """Share of the peak FLOP/s that kernels attain on average; docs/planning.md says where the default is from."""
    advise: bool = False
    """Look for the best layout: tensor and pipeline parallelism, recomputation, tokens per microbatch."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        positive(self, "world_size", "nodes_of", "network_gbit", "attainable_share")
        if self.gpu is not None:
            choice(self.gpu, "gpu", *GPUS)
        require(self.attainable_share <= 1, f"--attainable-share {self.attainable_share:g}: is a share, at most 1")
        require(not self.advise or self.gpu is not None, "--advise needs --gpu: which GPUs is the job to run on?")
        asked = self.world_size is not None or self.advise
        only_where(self, asked, "without --world-size", "gpu", "nodes_of", "json")
        only_where(self, self.gpu is not None, "without --gpu", "network_gbit", "attainable_share")

    @property
    def simulates(self) -> bool:
        """Whether anything is to be found out beside the configuration."""
        return self.world_size is not None or self.advise

    @property
    def hardware(self) -> Gpu | None:
        """--gpu, if any."""
        return None if self.gpu is None else GPUS[self.gpu]

    @property
    def network(self) -> float:
        """Bytes per second between nodes for each GPU, in one direction."""
        assert self.gpu is not None
        return GPUS[self.gpu].network * 1e9 if self.network_gbit is None else self.network_gbit * 1e9 / 8
