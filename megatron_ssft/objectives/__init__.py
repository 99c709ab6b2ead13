"""What a step trains: one file per objective (`ssft.py`, `gfpo.py`, `grpo.py`), each deciding step by step.

`objective.py` says what an objective is. The trainer executes what any of them decides.
"""

from __future__ import annotations

from megatron_ssft.config import GFPOConfig, TrainingRun
from megatron_ssft.objectives.gfpo import GFPO
from megatron_ssft.objectives.grpo import GRPO
from megatron_ssft.objectives.objective import Objective
from megatron_ssft.objectives.ssft import SSFT


def objective_of(config: TrainingRun) -> type[Objective]:
    """The objective that a configuration asks for."""
    if not isinstance(config, GFPOConfig):
        return SSFT
    return GRPO if config.policy.objective == "grpo" else GFPO
