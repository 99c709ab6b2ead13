"""The GPT: megatron-core's GPTModel with explicit positions, tag rows of their own, and a loss head without logits.

Shapes: b sequences, s tokens, h hidden, T scored tokens of a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention.kernels import CoreAttention, StreamParams
from megatron_ssft.parallel.model.forking_rows import ForkingRows
from megatron_ssft.parallel.model.loss_head import VocabParallelHead
from megatron_ssft.parallel.model.marks import mark
from megatron_ssft.parallel.model.norm import Norm


def padded_vocab_size(vocab_size: int, config: RunConfig) -> int:
    """`vocab_size` rounded up to --make-vocab-size-divisible-by and to the tensor-parallel size.

    For divisors that the tensor-parallel size divides, the result is the same at every parallel layout.
    """
    multiple = math.lcm(config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Translate our configuration into megatron-core's terms; what is left to the device is decided in it."""
    model, parallel = config.model, config.parallel
    use_te = model.transformer_impl == "transformer_engine"
    on_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if parallel.bf16 else torch.float32
    full = parallel.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,  # initialization.py does it, alike at every parallel layout
        use_cpu_initialization=not on_cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=parallel.bf16,
        deterministic_mode=parallel.deterministic_mode and on_cuda,  # the CPU's operators are as they are
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default one is refused with variable lengths, even without experts
        calculate_per_token_loss=True,
        # With batched sends and two stages the previous and the next stage are the same peer and would mix up.
        overlap_p2p_comm=config.virtual_pipeline_size is not None,
        batch_p2p_comm=config.virtual_pipeline_size is None,
        batch_p2p_sync=False,  # against a bug of old versions of torch
        bias_activation_fusion=bool(parallel.bias_swiglu_fusion),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,  # fused kernels take no explicit positions
        persist_layer_norm=use_te,
        gradient_accumulation_fusion=bool(parallel.gradient_accumulation_fusion),
    )


def layer_spec(config: RunConfig, core: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Specify the layers this pipeline stage builds, with the implementation --transformer-impl names."""
    if config.model.transformer_impl == "transformer_engine":
        spec, final_norm = _transformer_engine_spec(config)
    else:
        spec, final_norm = _local_spec(config), Norm
    count = get_num_layers_to_build(core, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=final_norm)


def _local_spec(config: RunConfig) -> object:
    spec = get_gpt_layer_local_spec(qk_layernorm=config.model.qk_layernorm, normalization=config.model.normalization)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.core_attention = CoreAttention
    attention.q_layernorm = attention.k_layernorm = Norm if config.model.qk_layernorm else IdentityOp
    return spec


def _transformer_engine_spec(config: RunConfig) -> tuple[object, type]:
    if not torch.cuda.is_available():
        raise UserError("--transformer-impl transformer_engine needs CUDA; use --transformer-impl local")
    try:
        from megatron.core.extensions.transformer_engine import TENorm
    except ImportError as error:
        raise UserError(
            "--transformer-impl transformer_engine: TransformerEngine is not installed; "
            "install the [te] extra or use --transformer-impl local"
        ) from error
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.model.qk_layernorm)
    if config.parallel.context_parallel_size == 1:  # only TransformerEngine's own shares a sequence between ranks
        spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec, TENorm


def _mark_sharded_weights(model: torch.nn.Module) -> None:
    """Tell sharded weights from replicated ones, as megatron-core before 0.18 does only when it draws them itself.

    Without the marks the gradient norm takes every rank's shard but the first for a replica and leaves it out.
    """
    partition_dims = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        dim = partition_dims.get(type(module))
        weight = None if dim is None else module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)


class SetGPTModel(GPTModel):
    """GPTModel whose forward takes positions and targets, and answers with the NLL of the scored tokens."""

    def __init__(
        self,
        config: RunConfig,
        core: TransformerConfig,
        vocab_size: int,
        row_ids: tuple[int, ...],
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        tied = not config.model.untie_embeddings_and_output_weights
        padded = padded_vocab_size(vocab_size, config)
        super().__init__(
            config=core,
            transformer_layer_spec=layer_spec(config, core, vp_stage),
            vocab_size=padded,
            max_sequence_length=config.tokenizer.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            rotary_percent=config.model.rotary_percent,
            rotary_base=config.model.rotary_base,
            vp_stage=vp_stage,
        )
        _mark_sharded_weights(self)
        tp_group = self.pg_collection.tp
        self.forking_rows: ForkingRows | None = None
        self.needs_input_gradient = False
        """Where embeddings are frozen and layers are recomputed: these get no gradient unless their input does."""
        self.finish_gathering: Callable[[Sequence[Tensor]], None] | None = None
        """Waits for weights that are still gathered. For those that are used outside of their modules' forward."""
        if row_ids and (pre_process or (post_process and tied)):
            over_stages = tied and core.pipeline_model_parallel_size > 1
            self.forking_rows = ForkingRows(core, row_ids, tp_group, over_stages)
            if not pre_process:
                mark(self.forking_rows.weight, "shared")  # the last stage's copy, not counted twice in the grad norm
        if post_process:
            self.head = VocabParallelHead(vocab_size, padded // tp_group.size(), row_ids, tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """Shard the state as Megatron does; the last stage's own tag rows are declared a copy of the first's."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.forking_rows is not None and not self.pre_process:
            entry = state[f"{prefix}forking_rows.weight"]
            entry.replica_id = (1, *entry.replica_id[1:])
        return state

    def vocab_tables(self) -> list[Tensor]:
        """List this rank's shards of the vocabulary tables: input embedding, output head, or the one tied table."""
        tables = [self.embedding.word_embeddings.weight] if self.pre_process else []
        if self.post_process and self.output_layer.weight is not None:
            tables.append(self.output_layer.weight)
        return tables

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        scored: Tensor,
        targets: Tensor | None,
        stream: StreamParams | None = None,
        top_k: int | None = None,
    ) -> Tensor:
        """Hidden states, or on the last stage float32 [T] or [T, k]: -log p(target) of the scored tokens.

        Without targets float32 [T, V / tp]: their logits over this rank's share of the vocabulary, for verification.
        With `top_k` float64 [T, 1 + 2 top_k], without gradient: see `VocabParallelHead.top`.

        Args:
            tokens, position_ids: int64 [b, s].
            scored: int64 [T], where the scored tokens stand in sequence-major order: s index * b + b index.
            targets: int64 [T], their targets, or [T, k], several tokens of interest each, or None.
            stream: who sees whom, where b = 1 and the row is a stream of segments; None: rows are causal.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens, position_ids=position_ids)
            if self.forking_rows is not None:
                hidden = self.forking_rows(hidden, tokens)
            if self.needs_input_gradient and torch.is_grad_enabled():
                hidden.requires_grad_()
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary_angles(position_ids),
            packed_seq_params=stream,
        )
        if not self.post_process:
            return hidden
        return self._answer(hidden, scored, targets, top_k)

    def _rotary_angles(self, position_ids: Tensor) -> Tensor:
        """float32 [s, b, 1, d]: the rotation angle of each channel at each token's own position."""
        frequencies = self.rotary_pos_emb.inv_freq = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        angles = position_ids.t().unsqueeze(-1).float() * frequencies
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)

    def _answer(self, hidden: Tensor, scored: Tensor, targets: Tensor | None, top_k: int | None) -> Tensor:
        """Answer as the last stage does, from hidden states [s (or s / tp), b, h]."""
        tp_group = self.pg_collection.tp
        # Looked up by embedding: the gradient of index_select adds up in any order on CUDA.
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=tp_group
            )
            selected = F.embedding(scored, hidden.flatten(0, 1))
        else:
            # Selected first: less to reduce in the backward, and what is reduced there is contiguous. megatron-core
            # all-reduces a copy of a strided gradient, and drops it.
            selected = F.embedding(scored, hidden.flatten(0, 1))
            selected = tensor_parallel.copy_to_tensor_model_parallel_region(selected, group=tp_group)
        tied = self.share_embeddings_and_output_weights
        if self.finish_gathering is not None:
            modules = (self.output_layer, self.forking_rows if tied else None)
            self.finish_gathering([p for module in modules if module is not None for p in module.parameters()])
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        rows = self.forking_rows.for_output_head() if tied and self.forking_rows is not None else None
        if targets is None:
            return self.head.logits(selected, weight, rows)
        if top_k is not None:
            return self.head.top(selected, weight, targets, rows, top_k)
        return self.head.nll(selected, weight, targets, rows)


def build_model_chunks(config: RunConfig, vocab_size: int, row_ids: tuple[int, ...]) -> list[SetGPTModel]:
    """Build this rank's model chunks: one, or as many as the virtual pipeline asks for. Weights are not initialised."""
    core = transformer_config(config)
    stages: list[int | None] = (
        [None] if config.virtual_pipeline_size is None else list(range(config.virtual_pipeline_size))
    )
    return [
        SetGPTModel(
            config,
            core,
            vocab_size,
            row_ids,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in stages
    ]
