"""AdamW from megatron-core over DDP-wrapped model chunks, and the tags' own learning rate.

`set_hyperparameters` multiplies the learning rate of the tags' rows (model/forking_rows.py) by
--forking-token-lr-mult.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.transformer.module import Float16Module

from megatron_ssft.config import RunConfig
from megatron_ssft.parallel.flat_shards import flat_states, sharded_flat_states
from megatron_ssft.parallel.model.gpt import SetGPTModel

ShardedState = dict[str, Any]
"""megatron-core's nested dictionaries of what is saved or loaded, with leaves of its own types."""
_NOBODY = "nobody"
"""Stands for a parameter in the state of an optimizer that has none."""
_MASTERS = "fp32_from_fp16_params"
"""Mixed precision's own copies of the parameters, a list for every group."""


def wrap_chunks(chunks: list[SetGPTModel], config: RunConfig) -> list[DistributedDataParallel]:
    """Mixed precision and data parallelism around every chunk; gradients are summed in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bool(config.parallel.overlap_grad_reduce),
        overlap_param_gather=bool(config.parallel.overlap_param_gather),
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    wrapped = []
    for i, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if config.parallel.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                config=chunk.config,
                ddp_config=ddp_config,
                module=module,
                disable_bucketing=i > 0 or not config.parallel.overlap_grad_reduce,
            )
        )
    for chunk, inner in zip(wrapped, chunks):
        chunk.broadcast_params()
        if config.parallel.overlap_param_gather:
            inner.finish_gathering = partial(_finish_gathering, chunk)
    return wrapped


def _finish_gathering(chunk: DistributedDataParallel, parameters: Sequence[torch.Tensor]) -> None:
    """Wait for weights that are gathered, as megatron-core's hooks do before a module's forward pass."""
    for parameter in parameters:
        if parameter in chunk.param_to_bucket_group:
            chunk.param_to_bucket_group[parameter].finish_param_sync()


def gather_parameters(wrapped: list[DistributedDataParallel]) -> None:
    """Gather the weights that the last step changed, where the next forward pass would do it. Collective."""
    for chunk in wrapped:
        if not chunk.ddp_config.overlap_param_gather:
            continue
        for group in chunk.bucket_groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def build_optimizer(wrapped: list[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """AdamW; --forking-token-lr-mult applies to the parameters named forking_rows."""
    training, parallel = config.training, config.parallel
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=parallel.bf16,
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=bool(parallel.overlap_param_gather),
    )
    exempt = {
        "one_dimensional": lambda parameter: parameter.dim() == 1,  # norms and biases
        "only_tag_rows": lambda parameter: getattr(parameter, "only_tag_rows", False),  # the other rows must stay
    }
    overrides = {
        **{ParamKey(predicate=ParamPredicate(name, holds)): {"wd_mult": 0.0} for name, holds in exempt.items()},
        # A group of its own even at multiplier 1, so that a later run may choose another multiplier. The mark is
        # part of what megatron-core knows a stored group by.
        ParamKey(name="*forking_rows.weight"): {"max_lr": training.lr, "is_decoupled_lr": True},
    }
    return get_megatron_optimizer(optimizer_config, wrapped, config_overrides=overrides, use_gloo_process_groups=False)


def set_hyperparameters(optimizer: MegatronOptimizer, config: RunConfig, lr: float) -> None:
    """Put this step's learning rate and the configured AdamW constants into every parameter group.

    All of them, every step: groups restored from a checkpoint carry the values of the run that saved it.
    """
    training = config.training
    for group in optimizer.param_groups:
        group["lr"] = lr * (config.forking.forking_token_lr_mult if group["is_decoupled_lr"] else 1.0)
        group["weight_decay"] = training.weight_decay * group["wd_mult"]
        group["betas"] = (training.adam_beta1, training.adam_beta2)
        group["eps"] = training.adam_eps


def state_tensors(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """What the optimizer itself holds on the device: AdamW's moments, and the float32 weights of mixed precision."""
    tensors: list[torch.Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        tensors += [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        if getattr(part.config, "bf16", False):
            tensors += [p for group in inner.param_groups for p in group["params"] if p.dtype == torch.float32]
    return tensors


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its AdamW state, as a first step would, so that a checkpoint has a place to load into.

    megatron-core's distributed optimizer asks torch's AdamW for its step count before it has one; apex's and
    TransformerEngine's keep the count elsewhere and need nothing.
    """
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model: ShardedState, is_loading: bool, metadata: dict[str, object]
) -> ShardedState:
    """Collect what is saved or loaded of the optimizer, as megatron-core's sharded tensors; `model` holds the model's.

    megatron-core stores one step count for all parameters, that of the first rank, and its distributed optimizer wants
    one on every rank. A pipeline stage whose layers are all frozen has no parameter to count for, so it is told.
    """
    if is_loading:
        allocate_state(optimizer)
    inners = _torch_optimizers(optimizer)
    counts = [float(state["step"]) for inner in inners for state in inner.state.values()]
    count = torch.tensor(max(counts, default=0.0), device=torch.cuda.current_device())
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    idle = [inner for inner in inners if not inner.state]
    for inner in idle:
        inner.state[_NOBODY] = {"step": count.cpu()}  # type: ignore[index]  # torch stores keys of any type
    distributed = _distributed(optimizer)
    if distributed is None:
        state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    else:
        if is_loading:
            distributed.load_state_dict(distributed.state_dict())  # allocates that of apex and TransformerEngine
        state = distributed.state_dict() | {"param_state_sharding_type": "fully_reshardable"}
    for inner in idle:
        inner.state.pop(_NOBODY)  # type: ignore[call-overload]  # as above
    state.get("optimizer", state).get("state", {}).pop(_NOBODY, None)  # mixed precision has it one deeper
    if distributed is not None:
        state["param_state"] = sharded_flat_states(distributed, model)
    if _MASTERS in state:  # by number, as megatron-core loses count where a group is empty
        state[_MASTERS] = {number: group for number, group in enumerate(state[_MASTERS]) if group}
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, state: ShardedState) -> None:
    """Restore the optimizer from a loaded checkpoint; what the distributed one holds is in its place already.

    With torch's AdamW megatron-core lets all parameters share one count, which each step would then advance once per
    parameter. So every parameter gets its own.
    """
    distributed = _distributed(optimizer)
    if distributed is None:
        if "optimizer" in state:
            masters = state.get(_MASTERS, {})
            state[_MASTERS] = [masters.get(number, []) for number in range(len(optimizer.param_groups))]
        optimizer.load_state_dict(state)
        return
    for name in ("param_state", "param_state_sharding_type"):
        state.pop(name)
    loaded = flat_states(distributed)
    distributed.load_state_dict(state)
    for (_, _, source), (_, _, target) in zip(loaded, flat_states(distributed)):
        for name, values in target.items():
            if values.data_ptr() != source[name].data_ptr():  # the optimizer took copies
                values.copy_(source[name])
    for inner in _torch_optimizers(optimizer):
        for each in inner.state.values():
            each["step"] = each["step"].clone()


def _distributed(optimizer: MegatronOptimizer) -> DistributedOptimizer | None:
    """The distributed optimizer, where the run has one; there is a single one of it then."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts[0] if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer) else None


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.AdamW]:
    """List the torch AdamWs inside; none where apex or TransformerEngine provide the optimizer."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(getattr(part, "optimizer", None), torch.optim.AdamW)]


def finalize_gradients(
    wrapped: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **kwargs: object
) -> None:
    """Reduce gradients as Megatron does, then those of tied tag rows over the first and the last stage."""
    finalize_model_grads(wrapped, num_tokens, **kwargs)
    group = parallel_state.get_embedding_group(check_initialized=False)
    for chunk in wrapped:
        for name, parameter in chunk.named_parameters():
            tied_rows = name.endswith("forking_rows.weight") and getattr(parameter, "shared_embedding", False)
            if tied_rows and parameter.requires_grad:
                dist.all_reduce(parameter.main_grad, group=group)
