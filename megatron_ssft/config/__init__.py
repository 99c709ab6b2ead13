"""Configuration: one dataclass per concern, a docstring per field, validated when built.

Field names are flag names with underscores and carry Megatron's names where Megatron has the flag. The names are
unique over all sections, so a YAML file holds them flat. `programs.py` composes the sections into what each program is
configured by; `flags.py` turns that into flags and files.
"""

from megatron_ssft.config.data import DataConfig
from megatron_ssft.config.model import ModelConfig, ParallelConfig
from megatron_ssft.config.policy import PolicyConfig
from megatron_ssft.config.programs import (
    ConversionConfig,
    GFPOConfig,
    ProgramConfig,
    RunConfig,
    SSFTConfig,
    TrainingRun,
    check_schedule,
)
from megatron_ssft.config.run import CheckpointConfig, LoggingConfig
from megatron_ssft.config.tokens import ForkingTokenConfig, StartConfig, TokenizerConfig
from megatron_ssft.config.training import BatchConfig, MatchingConfig, TrainingConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "ConversionConfig",
    "DataConfig",
    "ForkingTokenConfig",
    "GFPOConfig",
    "LoggingConfig",
    "MatchingConfig",
    "ModelConfig",
    "ParallelConfig",
    "PolicyConfig",
    "ProgramConfig",
    "RunConfig",
    "SSFTConfig",
    "StartConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TrainingRun",
    "check_schedule",
]
