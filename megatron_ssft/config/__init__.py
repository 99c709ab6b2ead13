"""Configuration: one dataclass a concern, a docstring a field, validated when built.

Field names are flag names with underscores and carry Megatron's names where Megatron has the flag. The names are
unique over all sections, so a YAML file holds them flat. `arguments.py` turns this into flags and files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_ssft.config.checks import require
from megatron_ssft.config.data import DataConfig, ForkingTokenConfig
from megatron_ssft.config.model import ModelConfig, ParallelConfig
from megatron_ssft.config.policy import PolicyConfig
from megatron_ssft.config.run import CheckpointConfig, LoggingConfig
from megatron_ssft.config.training import MatchingConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ForkingTokenConfig",
    "GFPOConfig",
    "LoggingConfig",
    "MatchingConfig",
    "ModelConfig",
    "ParallelConfig",
    "PolicyConfig",
    "TrainingConfig",
]


@dataclass
class Config:
    """Everything one run is decided by."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    forking: ForkingTokenConfig
    matching: MatchingConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    def __post_init__(self) -> None:
        """Checks that span sections."""
        model, parallel = self.model, self.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        require(
            parallel.context_parallel_size == 1 or model.transformer_impl == "transformer_engine",
            "--context-parallel-size above 1 needs --transformer-impl transformer_engine: only its attention "
            "can share a sequence between ranks",
        )
        require(
            parallel.context_parallel_size == 1 or self.training.sequence_layout == "padded",
            "--context-parallel-size above 1 needs --sequence-layout padded: a stream cannot be shared between ranks",
        )
        require(
            parallel.context_parallel_size == 1
            or not (self.checkpoint.export_hf_at_save and self.checkpoint.verify_hf),
            "--export-hf-at-save cannot be verified with --context-parallel-size above 1; give --no-verify-hf and run "
            "tools/convert_hf.py verify afterwards",
        )
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            require(
                getattr(model, name) % tp == 0,
                f"--{name.replace('_', '-')} {getattr(model, name)} is not divisible by "
                f"--tensor-model-parallel-size {tp}",
            )
        chunk = parallel.num_layers_per_virtual_pipeline_stage
        per_stage = model.num_layers / pp
        require(
            per_stage == int(per_stage),
            f"--num-layers {model.num_layers} is not divisible by --pipeline-model-parallel-size {pp}",
        )
        if chunk is not None:
            require(
                per_stage % chunk == 0 and per_stage > chunk,
                f"{int(per_stage)} layers a pipeline stage must be a multiple (2 or more) of "
                f"--num-layers-per-virtual-pipeline-stage {chunk}",
            )
        require(
            parallel.attention_backend == "auto" or self.training.sequence_layout != "padded",
            f"--attention-backend {parallel.attention_backend} is for streams: it needs --sequence-layout packed or "
            "concatenated",
        )
        require(
            self.matching.matching_precision == "model" or self.matching.matching != "single",
            "--matching-precision bf16: with --matching single nothing is scored; leave it out",
        )
        require(
            self.matching.matching_precision == "model" or not parallel.bf16,
            "--matching-precision bf16: with --bf16 the cost pass is in bfloat16 already; leave it out",
        )
        require(
            self.logging.eval_interval is None or bool(self.data.eval_data_path),
            "--eval-interval needs --eval-data-path",
        )

    @property
    def train_tokens_per_microbatch(self) -> int:
        """--max-tokens-per-microbatch, by default as much as the longest microbatch of the padded layout has."""
        return self.training.max_tokens_per_microbatch or self.training.micro_batch_size * self.data.seq_length

    @property
    def cost_tokens_per_microbatch(self) -> int:
        """--matching-tokens-per-microbatch, by default what a training microbatch may hold."""
        return self.matching.matching_tokens_per_microbatch or self.train_tokens_per_microbatch

    @property
    def virtual_pipeline_size(self) -> int | None:
        """Model chunks a rank holds under the interleaved schedule, or None."""
        chunk = self.parallel.num_layers_per_virtual_pipeline_stage
        if chunk is None:
            return None
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size // chunk

    def flat(self) -> dict[str, object]:
        """All fields by name, without their sections: the form of config.yaml."""
        return {
            f.name: getattr(getattr(self, section.name), f.name)
            for section in dataclasses.fields(self)
            for f in dataclasses.fields(getattr(self, section.name))
        }


@dataclass
class GFPOConfig(Config):
    """Everything one run of policy learning is decided by."""

    policy: PolicyConfig

    def __post_init__(self) -> None:
        """Checks that span sections."""
        context = self.parallel.context_parallel_size
        require(
            context == 1,
            f"--context-parallel-size {context}: the tags of a question are scored in one place; give 1, and more "
            "--tensor-model-parallel-size where memory is short",
        )
        super().__post_init__()
        require(self.checkpoint.save is not None, "--save is required: the reference's answers are kept there")
        tags, fewest = self.forking, 1 if self.policy.objective == "grpo" else 2
        require(
            tags.num_forking_tokens >= fewest,
            f"--num-forking-tokens {tags.num_forking_tokens}: --objective {self.policy.objective} needs a model with "
            f"{fewest} or more",
        )
        require(
            self.policy.trainable != "tag-rows" or tags.forking_token_format == "special",
            "--trainable tag-rows needs --forking-token-format special: text tags share ordinary tokens",
        )
        last = self.policy.last_layers
        require(
            last is None or last <= self.model.num_layers,
            f"--trainable {self.policy.trainable}: the model has {self.model.num_layers} layers",
        )
