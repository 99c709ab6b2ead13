"""Which objective a configuration asks for."""

from __future__ import annotations

from megatron_ssft.config import GFPOConfig, TrainingRun
from megatron_ssft.objectives.gfpo import GFPO
from megatron_ssft.objectives.grpo import GRPO
from megatron_ssft.objectives.objective import Objective
from megatron_ssft.objectives.ssft import SSFT


def objective_of(config: TrainingRun) -> type[Objective]:
    """The class of the objective."""
    if not isinstance(config, GFPOConfig):
        return SSFT
    return GRPO if config.policy.objective == "grpo" else GFPO
