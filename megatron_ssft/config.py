"""Configuration: one dataclass a concern, a docstring a field, validated when built.

Field names are flag names with underscores and carry Megatron's names where Megatron has the flag. The names are
unique over all sections, so a YAML file holds them flat. `arguments.py` turns this into flags and files.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from megatron_ssft.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _choice(value: str | None, flag: str, *choices: str) -> None:
    _require(value in choices, f"--{flag} {value}: choose one of {', '.join(choices)}")


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        ok = value is None or 0 < value < math.inf
        _require(ok, f"--{name.replace('_', '-')} {value}: must be a finite number greater than 0")


@dataclass
class ModelConfig:
    """Shape of the GPT."""

    num_layers: int | None = None
    """Number of transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; default 4 x hidden size."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: int | None = None
    """Width of one head; default hidden size / number of heads."""
    normalization: str = "RMSNorm"
    """RMSNorm or LayerNorm."""
    norm_epsilon: float = 1e-5
    """Epsilon of the normalisation."""
    swiglu: bool = True
    """Gated SiLU MLP; --no-swiglu gives GELU."""
    add_bias_linear: bool = False
    """Biases in every linear layer of attention and MLP."""
    add_qkv_bias: bool = False
    """Bias in the QKV projection only (Qwen2)."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head (Qwen3)."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output head its own weights instead of the input embedding."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it / sqrt(2 x layers)."""
    vocab_size: int | None = None
    """Rows of the embedding in use, where a loaded model has more than its tokenizer knows; default: as many as
    tokenizer and forking tokens need."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this (and of the tensor-parallel size); padding rows get no
    probability."""
    transformer_impl: str = "local"
    """local (megatron-core's own layers, runs anywhere) or transformer_engine (needs CUDA)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads"):
            _require(getattr(self, name) is not None, f"--{name.replace('_', '-')} is required")
        _positive(
            self,
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "ffn_hidden_size",
            "vocab_size",
            "make_vocab_size_divisible_by",
            "rotary_base",
            "norm_epsilon",
        )
        _choice(self.normalization, "normalization", "RMSNorm", "LayerNorm")
        _choice(self.transformer_impl, "transformer-impl", "local", "transformer_engine")
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.kv_channels is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}; give --kv-channels if that is meant",
            )
            self.kv_channels = self.hidden_size // self.num_attention_heads
        _require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"--num-attention-heads {self.num_attention_heads} must be a multiple of --num-query-groups "
            f"{self.num_query_groups}",
        )
        _require(0 < self.rotary_percent <= 1, f"--rotary-percent {self.rotary_percent}: must be in (0, 1]")
        _require(
            int(self.kv_channels * self.rotary_percent) % 2 == 0,
            f"rotary positions need an even number of rotated channels, not "
            f"{int(self.kv_channels * self.rotary_percent)}: change --kv-channels or --rotary-percent",
        )


@dataclass
class ParallelConfig:
    """How the model is spread over ranks, and in which precision."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one virtual pipeline chunk (interleaved schedule); unset or 0: no virtual pipeline."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; more than 1 needs --transformer-impl transformer_engine."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    bf16: bool = False
    """Weights and activations in bfloat16 with float32 master weights and gradients; default float32."""
    recompute_granularity: str | None = None
    """full (whole layers) or selective (core attention): recompute activations in the backward pass."""
    recompute_method: str = "uniform"
    """With full recompute: uniform (chunks of layers) or block (the first layers of a stage)."""
    recompute_num_layers: int = 1
    """With full recompute: layers per chunk (uniform) or layers recomputed per stage (block)."""
    distributed_timeout_minutes: int = 30
    """A collective that takes longer than this ends the job."""

    def __post_init__(self) -> None:
        if self.num_layers_per_virtual_pipeline_stage == 0:  # overrides a configuration file that has one
            self.num_layers_per_virtual_pipeline_stage = None
        _positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "recompute_num_layers",
            "distributed_timeout_minutes",
        )
        if self.recompute_granularity is not None:
            _choice(self.recompute_granularity, "recompute-granularity", "full", "selective")
        _choice(self.recompute_method, "recompute-method", "uniform", "block")
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "--sequence-parallel needs --tensor-model-parallel-size of at least 2: there is nothing to shard",
        )
        _require(
            self.num_layers_per_virtual_pipeline_stage is None or self.pipeline_model_parallel_size > 1,
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2",
        )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class DataConfig:
    """Questions, traces, tokens."""

    data_path: list[str] = field(default_factory=list)
    """JSONL files of questions with their traces."""
    eval_data_path: list[str] = field(default_factory=list)
    """Held-out JSONL files for the evaluation loss."""
    data_cache_path: str | None = None
    """Where tokenized data is kept; default: data_cache in the --save folder, else in the user's cache folder."""
    tokenizer_type: str = "HuggingFaceTokenizer"
    """CharTokenizer, SentencePieceTokenizer or HuggingFaceTokenizer."""
    tokenizer_model: str | None = None
    """SentencePiece model file or Hugging Face folder."""
    seq_length: int = 2048
    """Longest sequence (prompt, tag and completion) in tokens."""
    overlong_traces: str = "truncate"
    """What to do with a trace that does not fit: truncate (its end is then not trained), drop, or refuse."""
    max_traces: int | None = None
    """Sample at most this many traces of each question (once, by --seed and the question's id)."""
    trace_filter: str | None = None
    """Keep traces whose fields match, e.g. correct=true,source=human|tora; a question left without traces is
    dropped."""
    answer_separator: str = "\n"
    """Put between a trace's text and its answer, where the data keeps the answer apart."""
    train_forking_token: bool = False
    """Put loss on the tag itself, for models that shall choose it."""

    def __post_init__(self) -> None:
        _choice(
            self.tokenizer_type,
            "tokenizer-type",
            "CharTokenizer",
            "SentencePieceTokenizer",
            "HuggingFaceTokenizer",
        )
        _choice(self.overlong_traces, "overlong-traces", "truncate", "drop", "refuse")
        _require(bool(self.data_path), "--data-path is required")
        _require(
            self.tokenizer_type == "CharTokenizer" or self.tokenizer_model is not None,
            f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model",
        )
        _positive(self, "seq_length", "max_traces")


@dataclass
class ForkingTokenConfig:
    """The global forking tokens (tags) that start the reasoning."""

    num_forking_tokens: int = 6
    """N, the number of tags; 0 only for converting a model without any."""
    forking_token_format: str = "special"
    """special (one added vocabulary entry each) or text (ordinary tokens, the published checkpoint's form)."""
    forking_token_template: str | None = None
    """Text of a tag, {i} counting from 1; default <think{i}>, for text <|im_start|><think{i}>\\n where the
    tokenizer knows <|im_start|>."""
    forking_token_init: str = "noise"
    """Initial input rows: mean (of all embedding rows), noise (mean + seeded noise) or copy:<token>."""
    forking_token_noise: float = 1.0
    """Standard deviation of the noise (noise, copy), relative to the RMS of the embedding rows."""
    forking_token_lr_mult: float = 1.0
    """Learning rate of the tags' own input rows, as a multiple of --lr (special only)."""

    def __post_init__(self) -> None:
        _require(self.num_forking_tokens >= 0, "--num-forking-tokens must not be negative")
        _positive(self, "forking_token_lr_mult")
        _choice(self.forking_token_format, "forking-token-format", "special", "text")
        _require(
            self.forking_token_init in ("mean", "noise") or self.forking_token_init.startswith("copy:"),
            f"--forking-token-init {self.forking_token_init}: choose mean, noise or copy:<token>",
        )
        _require(self.forking_token_noise >= 0, "--forking-token-noise must not be negative")
        _require(
            self.forking_token_lr_mult == 1.0 or self.forking_token_format == "special",
            "--forking-token-lr-mult needs --forking-token-format special: text tags share ordinary tokens, "
            "so they have no rows of their own",
        )
        template = self.forking_token_template
        _require(template is None or "{i}" in template, "--forking-token-template must contain {i}")


@dataclass
class MatchingConfig:
    """Which trace is trained under which tag."""

    matching: str = "optimal"
    """optimal (minimum-cost bipartite matching, the paper), random (its ablation), fixed (trace j under tag j),
    single (all traces under the first tag: SFT on the mixed data)."""
    matching_tokens: int = 1000
    """T_r: the cost looks at the first this many tokens of a trace."""
    matching_tokens_per_microbatch: int | None = None
    """Padded tokens in one forward-only microbatch of the cost pass; default --micro-batch-size x --seq-length."""
    log_matching_interval: int = 0
    """With random, fixed: evaluate the cost matrix every this many steps for the log only; 0: never."""

    def __post_init__(self) -> None:
        _choice(self.matching, "matching", "optimal", "random", "fixed", "single")
        _positive(self, "matching_tokens", "matching_tokens_per_microbatch")
        _require(self.log_matching_interval >= 0, "--log-matching-interval must not be negative")


@dataclass
class TrainingConfig:
    """Batches, optimizer, learning rate."""

    micro_batch_size: int = 1
    """Sequences in one microbatch."""
    global_batch_size: int = 32
    """Traces in one optimizer step (the paper: 32 = 8 questions x 4 traces)."""
    train_iters: int | None = None
    """Optimizer steps; give this or --train-epochs."""
    train_epochs: int | None = None
    """Passes over the data; give this or --train-iters."""
    question_lookahead: int = 64
    """Questions the queue may look ahead to fill a global batch when the number of traces varies."""
    seed: int = 1234
    """Decides initial weights, data order and every random choice."""
    loss_normalization: str = "token"
    """token (mean over all completion tokens of the global batch) or sequence (mean over traces of their mean)."""
    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "cosine"
    """cosine, linear or constant."""
    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached; default: the whole run."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay steps, instead of --lr-warmup-iters."""
    weight_decay: float = 0.01
    """AdamW weight decay; norms and biases are exempt."""
    adam_beta1: float = 0.9
    """AdamW beta 1."""
    adam_beta2: float = 0.95
    """AdamW beta 2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: no clipping."""

    def __post_init__(self) -> None:
        _positive(
            self,
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "train_epochs",
            "question_lookahead",
            "lr",
            "lr_decay_iters",
            "adam_eps",
        )
        _require(
            (self.train_iters is None) != (self.train_epochs is None),
            "give exactly one of --train-iters and --train-epochs",
        )
        _choice(self.loss_normalization, "loss-normalization", "token", "sequence")
        _choice(self.lr_decay_style, "lr-decay-style", "cosine", "linear", "constant")
        _require(0 <= self.min_lr <= self.lr, f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        _require(self.lr_warmup_iters >= 0, "--lr-warmup-iters must not be negative")
        _require(
            self.lr_warmup_fraction is None or 0 <= self.lr_warmup_fraction <= 1,
            "--lr-warmup-fraction must lie between 0 and 1",
        )
        _require(
            self.lr_warmup_fraction is None or self.lr_warmup_iters == 0,
            "give at most one of --lr-warmup-iters and --lr-warmup-fraction",
        )
        _require(self.weight_decay >= 0, "--weight-decay must not be negative")
        _require(self.clip_grad >= 0, "--clip-grad must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"--{name.replace('_', '-')} must lie in [0, 1)")


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = None
    """Folder of the run: checkpoints, metrics, assignments, resolved configuration."""
    load: str | None = None
    """Folder of a run to continue (with the same --save its logs go on where the checkpoint was taken), or a Hugging
    Face folder to start from."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    finetune: bool = False
    """Load only the weights: start at step 0 with a fresh optimizer."""
    export_hf_at_save: bool = False
    """With every checkpoint write a Hugging Face folder too (hf in the checkpoint's folder); needs a run that
    started from one."""
    verify_hf: bool = True
    """Compare every --export-hf-at-save with the checkpoint, tensor by tensor, and its logits with transformers."""

    def __post_init__(self) -> None:
        _positive(self, "save_interval")
        _require(self.save_interval is None or self.save is not None, "--save-interval needs --save")
        _require(not self.finetune or self.load is not None, "--finetune needs --load")
        _require(not self.export_hf_at_save or self.save is not None, "--export-hf-at-save needs --save")


@dataclass
class LoggingConfig:
    """What is written while training."""

    eval_interval: int | None = None
    """Steps between evaluations on --eval-data-path; one also follows the last step."""
    eval_questions: int | None = None
    """Evaluate on the first this many held-out questions only."""
    tensorboard_dir: str | None = None
    """TensorBoard folder; default: tensorboard in the --save folder."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too."""
    wandb_exp_name: str | None = None
    """Name of the run there."""

    def __post_init__(self) -> None:
        _positive(self, "eval_interval", "eval_questions")


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
        _require(
            parallel.context_parallel_size == 1 or model.transformer_impl == "transformer_engine",
            "--context-parallel-size above 1 needs --transformer-impl transformer_engine: only its attention "
            "can share a sequence between ranks",
        )
        _require(
            parallel.context_parallel_size == 1
            or not (self.checkpoint.export_hf_at_save and self.checkpoint.verify_hf),
            "--export-hf-at-save cannot be verified with --context-parallel-size above 1; give --no-verify-hf and run "
            "tools/convert_hf.py verify afterwards",
        )
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            _require(
                getattr(model, name) % tp == 0,
                f"--{name.replace('_', '-')} {getattr(model, name)} is not divisible by "
                f"--tensor-model-parallel-size {tp}",
            )
        chunk = parallel.num_layers_per_virtual_pipeline_stage
        per_stage = model.num_layers / pp
        _require(
            per_stage == int(per_stage),
            f"--num-layers {model.num_layers} is not divisible by --pipeline-model-parallel-size {pp}",
        )
        if chunk is not None:
            _require(
                per_stage % chunk == 0 and per_stage > chunk,
                f"{int(per_stage)} layers a pipeline stage must be a multiple (2 or more) of "
                f"--num-layers-per-virtual-pipeline-stage {chunk}",
            )
        _require(
            self.logging.eval_interval is None or bool(self.data.eval_data_path),
            "--eval-interval needs --eval-data-path",
        )

    @property
    def cost_tokens_per_microbatch(self) -> int:
        """--matching-tokens-per-microbatch, by default what a training microbatch may hold."""
        default = self.training.micro_batch_size * self.data.seq_length
        return self.matching.matching_tokens_per_microbatch or default

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
