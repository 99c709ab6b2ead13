"""What each program is configured by: sections, composed, with the checks that span them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ssft.config.checks import only_where, require
from megatron_ssft.config.data import DataConfig
from megatron_ssft.config.model import ModelConfig, ParallelConfig
from megatron_ssft.config.policy import PolicyConfig
from megatron_ssft.config.run import CheckpointConfig, LoggingConfig
from megatron_ssft.config.tokens import ForkingTokenConfig, StartConfig, TokenizerConfig
from megatron_ssft.config.training import BatchConfig, MatchingConfig, TrainingConfig


@dataclass
class RunConfig:
    """What every program that holds a model needs, whatever it does with it: the engine sees no more."""

    model: ModelConfig
    parallel: ParallelConfig
    tokenizer: TokenizerConfig
    forking: ForkingTokenConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    def __post_init__(self) -> None:
        """Checks that span sections."""
        model, parallel = self.model, self.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
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
            model.swiglu or not parallel.bias_swiglu_fusion,
            "--bias-swiglu-fusion has no use with --no-swiglu; leave it out",
        )

    @property
    def train_tokens_per_microbatch(self) -> int:
        """--max-tokens-per-microbatch, by default as much as the longest microbatch of the padded layout has."""
        return self.training.max_tokens_per_microbatch or self.training.micro_batch_size * self.tokenizer.seq_length

    @property
    def virtual_pipeline_size(self) -> int | None:
        """Model chunks a rank holds under the interleaved schedule, or None."""
        chunk = self.parallel.num_layers_per_virtual_pipeline_stage
        if chunk is None:
            return None
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size // chunk


def check_context_parallel(run: RunConfig) -> None:
    """Raise UserError where sequences are to be shared between ranks and cannot be."""
    require(
        run.parallel.context_parallel_size == 1 or run.model.transformer_impl == "transformer_engine",
        "--context-parallel-size above 1 needs --transformer-impl transformer_engine: only its attention "
        "can share a sequence between ranks",
    )
    require(
        run.parallel.context_parallel_size == 1 or run.training.sequence_layout == "padded",
        "--context-parallel-size above 1 needs --sequence-layout padded: a stream cannot be shared between ranks",
    )
    require(
        run.parallel.context_parallel_size == 1 or not (run.checkpoint.export_hf_at_save and run.checkpoint.verify_hf),
        "--export-hf-at-save cannot be verified with --context-parallel-size above 1; give --no-verify-hf and run "
        "megatron-ssft convert verify afterwards",
    )


def check_positions(tokenizer: TokenizerConfig) -> None:
    """Raise UserError for sequences longer than the model is for."""
    most = tokenizer.max_position_embeddings
    require(
        most is None or tokenizer.seq_length <= most,
        f"--seq-length {tokenizer.seq_length}: the model is for up to {most} positions; shorten it, or give "
        f"--max-position-embeddings {tokenizer.seq_length} to train it for more, which its exports then say",
    )


def check_schedule(training: TrainingConfig, train_iters: int) -> None:
    """Raise UserError for a learning rate that never gets where it is told to go."""
    warmup, decay = training.lr_warmup_iters, training.lr_decay_iters
    require(
        warmup <= train_iters,
        f"--lr-warmup-iters {warmup}: the run has {train_iters} steps, so --lr is never reached",
    )
    require(
        decay is None or training.lr_warmup_fraction is not None or warmup <= decay,
        f"--lr-decay-iters {decay}: the decay is over before the warm-up, --lr-warmup-iters {warmup}",
    )


@dataclass
class SSFTConfig:
    """What a run of Set Supervised Fine-Tuning is decided by."""

    run: RunConfig
    data: DataConfig
    matching: MatchingConfig
    batches: BatchConfig
    start: StartConfig

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Field name -> default of this program, where it is not the field's own."""

    def __post_init__(self) -> None:
        """Checks that span sections."""
        check_context_parallel(self.run)
        check_positions(self.run.tokenizer)
        require(
            (self.run.training.train_iters is None) != (self.batches.train_epochs is None),
            "give exactly one of --train-iters and --train-epochs",
        )
        require(
            self.matching.matching_precision == "model" or not self.run.parallel.bf16,
            "--matching-precision bf16: with --bf16 the cost pass is in bfloat16 already; leave it out",
        )
        cuts = self.data.overlong_traces == "truncate"
        here = f"with --overlong-traces {self.data.overlong_traces}, which truncates nothing"
        only_where(self.run.tokenizer, cuts, here, "max_truncated_share")
        text = self.run.forking.forking_token_format == "text"
        here = "with --forking-token-format text: such tags have no rows of their own"
        only_where(self.start, not text, here, "forking_token_init", "forking_token_noise")
        if self.run.training.train_iters is not None:
            check_schedule(self.run.training, self.run.training.train_iters)
        require(not self.start.finetune or self.run.checkpoint.load is not None, "--finetune needs --load")

    @property
    def cost_tokens_per_microbatch(self) -> int:
        """--matching-tokens-per-microbatch, by default what a training microbatch may hold."""
        return self.matching.matching_tokens_per_microbatch or self.run.train_tokens_per_microbatch


@dataclass
class GFPOConfig:
    """What a run of policy learning is decided by: GFPO, or GRPO to compare with."""

    run: RunConfig
    policy: PolicyConfig

    defaults: ClassVar[Mapping[str, Any]] = {"weight_decay": 0.0, "lr_decay_style": "constant", "seq_length": 4096}

    def __post_init__(self) -> None:
        """Checks that span sections."""
        run, policy = self.run, self.policy
        check_positions(run.tokenizer)
        context = run.parallel.context_parallel_size
        require(
            context == 1,
            f"--context-parallel-size {context}: the tags of a question are scored in one place; give 1, and more "
            "--tensor-model-parallel-size where memory is short",
        )
        require(run.training.train_iters is not None, "--train-iters is required: the number of optimizer steps")
        check_schedule(run.training, self.train_iters)
        require(run.checkpoint.save is not None, "--save is required: the reference's answers are kept there")
        tags, fewest = run.forking, 1 if policy.objective == "grpo" else 2
        require(
            tags.num_forking_tokens >= fewest,
            f"--num-forking-tokens {tags.num_forking_tokens}: --objective {policy.objective} needs a model with "
            f"{fewest} or more",
        )
        require(
            policy.trainable != "tag-rows" or tags.forking_token_format == "special",
            "--trainable tag-rows needs --forking-token-format special: text tags share ordinary tokens",
        )
        last = policy.last_layers
        require(
            last is None or last <= run.model.num_layers,
            f"--trainable {policy.trainable}: the model has {run.model.num_layers} layers",
        )

    @property
    def train_iters(self) -> int:
        """Optimizer steps."""
        assert self.run.training.train_iters is not None
        return self.run.training.train_iters

    @property
    def start(self) -> StartConfig:
        """The tags have their rows already."""
        return StartConfig()


@dataclass
class ConversionConfig:
    """What a conversion between Hugging Face folders and checkpoints is decided by."""

    run: RunConfig
    start: StartConfig

    defaults: ClassVar[Mapping[str, Any]] = {"num_forking_tokens": 0}

    def __post_init__(self) -> None:
        """Checks that span sections."""
        check_context_parallel(self.run)


TrainingRun = SSFTConfig | GFPOConfig
"""A configuration that the trainer takes."""
ProgramConfig = SSFTConfig | GFPOConfig | ConversionConfig
