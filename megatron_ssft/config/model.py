"""The model, and how it is spread over ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_ssft.config.checks import choice, derived, only_where, positive, require, required

_YEAR = 365 * 24 * 60
"""Minutes."""


@dataclass
class ModelConfig:
    """Shape of the GPT."""

    num_layers: int = required()
    """Number of transformer layers."""
    hidden_size: int = required()
    """Width of the residual stream."""
    ffn_hidden_size: int = derived()
    """Width of the MLP; default 4 x hidden size."""
    num_attention_heads: int = required()
    """Number of query heads."""
    num_query_groups: int = derived()
    """Number of key/value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: int = derived()
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
            require(getattr(self, name) is not None, f"--{name.replace('_', '-')} is required")
        positive(
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
        choice(self.normalization, "normalization", "RMSNorm", "LayerNorm")
        choice(self.transformer_impl, "transformer-impl", "local", "transformer_engine")
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.kv_channels is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}; give --kv-channels if that is meant",
            )
            self.kv_channels = self.hidden_size // self.num_attention_heads
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"--num-attention-heads {self.num_attention_heads} must be a multiple of --num-query-groups "
            f"{self.num_query_groups}",
        )
        require(0 < self.rotary_percent <= 1, f"--rotary-percent {self.rotary_percent}: must be in (0, 1]")
        require(
            int(self.kv_channels * self.rotary_percent) % 2 == 0,
            f"rotary positions need an even number of rotated channels, not "
            f"{int(self.kv_channels * self.rotary_percent)}: change --kv-channels or --rotary-percent",
        )


@dataclass
class ParallelConfig:
    """How the model is spread over ranks, and in which precision."""

    device: str = "auto"
    """auto (this rank's GPU; the CPU where the job has no GPU, and a refusal where it has one that torch cannot use),
    cuda or cpu."""
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
    overlap_grad_reduce: bool | None = None
    """Reduce gradients during the backward pass; default: on GPUs with --use-distributed-optimizer."""
    overlap_param_gather: bool | None = None
    """Gather the weights that the distributed optimizer has changed during the next forward pass; default: on GPUs,
    where gradients are reduced during the backward pass, which it needs."""
    bias_swiglu_fusion: bool | None = None
    """Compute SwiGLU in one kernel that keeps its input only; default: on GPUs."""
    gradient_accumulation_fusion: bool | None = None
    """Let weight gradients be added up in float32 by the product that makes them; default: on GPUs, where apex has the
    kernel for it."""
    bf16: bool = False
    """Weights and activations in bfloat16 with float32 master weights and gradients; default float32."""
    attention_backend: str = "auto"
    """Kernel for the packed layouts: auto (the fastest for the GPU that is there and agrees with SDPA), sdpa
    (anywhere), varlen (torch's, CUDA), flash, flash3, flash4 (FlashAttention 2, 3 and 4) or te (TransformerEngine); all
    but sdpa need --bf16."""
    deterministic_mode: bool = False
    """Take only kernels of the GPU that give the same bits each time, so that a run that is resumed ends as one that
    was not interrupted; slower, and attention's backward takes more memory. The CPU's are deterministic as they are."""
    attention_efficiency: float = 1.0
    """FLOP/s of core attention over that of the other matrix products, for balancing work over ranks; 1 balances
    FLOPs, a value measured on the hardware (benchmarks/layouts.py) balances time."""
    recompute_granularity: str | None = None
    """full (whole layers) or selective (core attention): recompute activations in the backward pass."""
    recompute_method: str = "uniform"
    """With full recompute: uniform (chunks of layers) or block (the first layers of a stage)."""
    recompute_num_layers: int = 1
    """With full recompute: layers per chunk (uniform) or layers recomputed per stage (block)."""
    distributed_timeout_minutes: float = 30.0
    """A rank that gives no sign of life for this long ends the job, as does a collective or a step that takes longer,
    and ranks that do not come to the start."""
    slow_work_timeout_minutes: float = 720.0
    """The same for work of one rank that the others wait for: tokenizing, loading, saving, exporting, verifying. A rank
    that is stopped or dead meanwhile is noticed after --distributed-timeout-minutes all the same."""

    def __post_init__(self) -> None:
        if self.num_layers_per_virtual_pipeline_stage == 0:  # overrides a configuration file that has one
            self.num_layers_per_virtual_pipeline_stage = None
        positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "recompute_num_layers",
            "distributed_timeout_minutes",
            "slow_work_timeout_minutes",
            "attention_efficiency",
        )
        choice(self.device, "device", "auto", "cuda", "cpu")
        choice(self.attention_backend, "attention-backend", "auto", "sdpa", "varlen", "flash", "flash3", "flash4", "te")
        if self.recompute_granularity is not None:
            choice(self.recompute_granularity, "recompute-granularity", "full", "selective")
        choice(self.recompute_method, "recompute-method", "uniform", "block")
        full = self.recompute_granularity == "full"
        only_where(self, full, "without --recompute-granularity full", "recompute_method", "recompute_num_layers")
        quick, slow = self.distributed_timeout_minutes, self.slow_work_timeout_minutes
        require(
            quick <= slow, f"--slow-work-timeout-minutes {slow:g}: is below --distributed-timeout-minutes {quick:g}"
        )
        for name in ("distributed_timeout_minutes", "slow_work_timeout_minutes"):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            require(0.05 <= value <= _YEAR, f"{flag} {value:g}: must lie between 0.05 and {_YEAR} (a year)")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "--sequence-parallel needs --tensor-model-parallel-size of at least 2: there is nothing to shard",
        )
        require(
            self.num_layers_per_virtual_pipeline_stage is None or self.pipeline_model_parallel_size > 1,
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2",
        )

        require(
            not self.overlap_param_gather or self.use_distributed_optimizer,
            "--overlap-param-gather needs --use-distributed-optimizer: every rank changes all weights without it",
        )
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce is not False,
            "--overlap-param-gather needs gradients to be reduced during the backward pass: leave "
            "--no-overlap-grad-reduce out",
        )

    def decided(self, on_gpu: bool, has_gradient_kernel: bool) -> ParallelConfig:
        """The same with a value for every setting that is left to the device.

        Args:
            on_gpu: the model is on GPUs.
            has_gradient_kernel: apex's kernel for --gradient-accumulation-fusion is there.
        """

        def default(value: bool | None, applies: bool) -> bool:
            return applies if value is None else value

        sharded = on_gpu and self.use_distributed_optimizer
        reduced = default(self.overlap_grad_reduce, sharded or bool(self.overlap_param_gather))
        return dataclasses.replace(
            self,
            overlap_grad_reduce=reduced,
            overlap_param_gather=default(self.overlap_param_gather, sharded and reduced),
            bias_swiglu_fusion=default(self.bias_swiglu_fusion, on_gpu),
            gradient_accumulation_fusion=default(self.gradient_accumulation_fusion, on_gpu and has_gradient_kernel),
        )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
