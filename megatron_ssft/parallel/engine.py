"""Executes plans on the model: forward-only for costs, forward and backward for training. Knows no objective.

Every rank holds the same plan and cuts its own microbatches from the memory-mapped data, so nothing but
activations, gradients and one vector of sums travels between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ssft.config import Config
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention import AttentionBackend, choose_backend
from megatron_ssft.parallel.collectives import collect_logits, sum_over_ranks
from megatron_ssft.parallel.model import SetGPTModel, build_model_chunks
from megatron_ssft.parallel.optimizer import build_optimizer, finalize_gradients, set_hyperparameters, wrap_chunks
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import ForkingTokens, Microbatch, MicrobatchPlan, ModelInput, QuestionBatch, StepMetrics
from megatron_ssft.scheduling.collate import collate, context_parallel_share, rows_input
from megatron_ssft.scheduling.cost_stream_plan import distinct_traces
from megatron_ssft.scheduling.stream import build_stream

Cut = Callable[[Microbatch], ModelInput]
"""Cuts a microbatch from the data."""


class Engine:
    """The model of this rank and everything that runs on it."""

    def __init__(self, config: Config, topology: Topology, tags: ForkingTokens, vocab_size: int) -> None:
        """Build the model without weights; `start` makes it trainable once they are there.

        Args:
            vocab_size: vocabulary entries in use, tags included.
        """
        self.config = config
        self.topology = topology
        self.tags = tags
        self.vocab_size = vocab_size
        self.chunks: list[SetGPTModel] = build_model_chunks(config, vocab_size, tags.row_ids)
        for chunk in self.chunks:
            chunk.to(topology.device)
        self.attention = self._choose_attention()
        self.wrapped: list[DistributedDataParallel] = []
        self.optimizer: MegatronOptimizer | None = None

    def start(self) -> None:
        """Wrap the model and build the optimizer from the weights it now holds."""
        self.wrapped = wrap_chunks(self.chunks, self.config)
        self.optimizer = build_optimizer(self.wrapped, self.config)
        core = self.chunks[0].config
        core.grad_scale_func = self.optimizer.scale_loss
        core.finalize_model_grads_func = finalize_gradients
        if self.config.parallel.overlap_grad_reduce:
            hooks = [chunk.no_sync for chunk in self.wrapped]
            core.no_sync_func = hooks if len(hooks) > 1 else hooks[0]

    def _choose_attention(self) -> AttentionBackend:
        model, tp_size = self.config.model, self.topology.tp_size
        return choose_backend(
            self.config.parallel.attention_backend,
            num_heads=model.num_attention_heads // tp_size,
            num_groups=model.num_query_groups // tp_size,
            channels=model.kv_channels,
            dtype=torch.bfloat16 if self.config.parallel.bf16 else torch.float32,
            device=self.topology.device,
        )

    @property
    def num_parameters(self) -> int:
        """Parameters on this rank."""
        return sum(p.numel() for chunk in self.chunks for p in chunk.parameters())

    # -- costs ---------------------------------------------------------------------------------------------------

    def costs(self, batch: QuestionBatch, plan: MicrobatchPlan, matching_tokens: int) -> list[np.ndarray]:
        """Q matrices float64 [N, M]: mean NLL of each trace's first T_r tokens under each tag (paper, section 2.2).

        Per-token float32 NLLs are summed in float64; the pairs of all ranks meet in one all-reduce, so the result
        is the same everywhere and does not depend on which rank scored a pair.
        """
        n = self.tags.num_tags
        first = np.cumsum([0] + [n * s.num_traces for s in batch.sets])
        sums_and_counts = np.zeros((2, first[-1]))
        cut = partial(self._input, batch, plan.layout, max_completion_tokens=matching_tokens)
        low_precision = self.config.matching.matching_precision == "bf16"
        for microbatch, model_input, nll in self._forward_only(plan, cut, low_precision):
            size = len(microbatch.sequences)
            sums = np.bincount(model_input.owner, weights=nll, minlength=size)
            counts = np.bincount(model_input.owner, minlength=size)
            for spec, *values in zip(microbatch.sequences, sums, counts):
                if not spec.is_pad:
                    pair = first[spec.question] + spec.tag * batch.sets[spec.question].num_traces + spec.trace
                    sums_and_counts[:, pair] += values
        sums, counts = sum_over_ranks(sums_and_counts, self.topology)
        costs = []
        for q, tokenized in enumerate(batch.sets):
            pairs = slice(first[q], first[q + 1])
            known = np.divide(
                sums[pairs], counts[pairs], out=np.full(n * tokenized.num_traces, np.nan), where=counts[pairs] > 0
            )
            twins = list(distinct_traces(tokenized, matching_tokens))  # a trace like an earlier one is not scored again
            costs.append(known.reshape(n, tokenized.num_traces)[:, twins])
        return costs

    def evaluate(self, batch: QuestionBatch, plan: MicrobatchPlan, denominator: float) -> float:
        """The training loss of the plan without a gradient."""
        loss = 0.0
        for _, model_input, nll in self._forward_only(plan, partial(self._input, batch, plan.layout)):
            loss += float((nll * model_input.weights.astype(np.float64)).sum())
        return float(sum_over_ranks(np.array([loss]), self.topology)[0] / denominator)

    def _forward_only(
        self, plan: MicrobatchPlan, cut: Cut, low_precision: bool = False
    ) -> list[tuple[Microbatch, ModelInput, np.ndarray]]:
        """(microbatch, its input, float64 [n] NLL) for this rank's share; empty on ranks that report no loss."""
        outputs: list[tuple[Microbatch, ModelInput, Tensor]] = []

        def keep(microbatch: Microbatch, model_input: ModelInput, output: Tensor, non_loss_data: bool = True) -> None:
            if self.topology.reports_loss:
                outputs.append((microbatch, model_input, output.detach()))

        def step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, object]:
            microbatch = next(data)
            model_input = cut(microbatch)
            return self._forward(model, model_input), partial(keep, microbatch, model_input)

        for chunk in self.wrapped:
            chunk.eval()
        device = self.topology.device.type
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=low_precision):
            self._schedule(step, plan, forward_only=True, collect_non_loss_data=True)
        return [(m, i, output.double().cpu().numpy()) for m, i, output in outputs]  # after the last is under way

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, batch: QuestionBatch, plan: MicrobatchPlan, denominator: float, lr: float) -> StepMetrics:
        """One optimizer step over the plan.

        The loss is sum(weight x NLL) / denominator over the whole global batch. Dividing every weight here, rather
        than gradients later, makes loss and gradient independent of micro-batch size, accumulation and layout.

        Raises:
            UserError: the loss or the gradient is not finite; the weights are left as they were for a bad loss.
        """
        device = self.topology.device
        loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=device)  # no host sync within the step

        def loss_of(weights: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss = (output * weights).sum()
            if self.topology.reports_loss:
                loss_and_tokens[0] += loss.detach()
                loss_and_tokens[1] += weights.numel()
            # Zero tokens tell Megatron to leave the gradients as they are: they are normalised already.
            return loss, torch.zeros([], dtype=torch.int, device=device), {}

        def step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, object]:
            model_input = self._input(batch, plan.layout, next(data))
            weights = torch.from_numpy(model_input.weights / np.float32(denominator))
            weights = weights.to(device, non_blocking=True)  # before the forward pass, which a copy would wait for
            return self._forward(model, model_input), partial(loss_of, weights)

        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._schedule(step, plan, forward_only=False)
        loss, tokens = sum_over_ranks(loss_and_tokens.cpu().numpy(), self.topology)
        if not np.isfinite(loss):
            raise UserError(f"{batch.sets[0].where}: the loss of the step that starts with this question is {loss}")
        set_hyperparameters(self.optimizer, self.config, lr)
        _, grad_norm, _ = self.optimizer.step()
        if not np.isfinite(grad_norm):
            raise UserError(
                f"{batch.sets[0].where}: the gradient of the step that starts with this question is not finite"
            )
        return StepMetrics(
            loss=float(loss),
            grad_norm=float(grad_norm),
            trained_sequences=len(plan.sequences),
            trained_tokens=int(tokens),
        )

    # -- verification --------------------------------------------------------------------------------------------

    def logits(self, ids: list[int]) -> Tensor | None:
        """float32 [T, vocabulary in use] of one sequence, on the first rank; None elsewhere. Collective.

        Holds the whole logits: for verification on short sequences only.
        """
        assert self.topology.cp_size == 1, "each rank must see the whole sequence"
        device, multiple = self.topology.device, self._pad_to_multiple
        padded = ids + [0] * (-len(ids) % multiple)
        tokens = torch.tensor([padded], device=device)
        positions = torch.arange(len(padded), device=device)[None]
        kept: list[Tensor] = []

        def step(data: Iterator[int], model: torch.nn.Module) -> tuple[Tensor, object]:
            next(data)
            scored = torch.arange(len(ids), device=device)
            return model(tokens, positions, scored, None), lambda output, non_loss_data=True: kept.append(output)

        with torch.no_grad():
            copies = range(self.config.parallel.pipeline_model_parallel_size)  # the interleaved schedule needs a group
            self._run_schedule(step, copies, len(padded), 1, forward_only=True, collect_non_loss_data=True)
        share = kept[0] if kept else None
        return collect_logits(share, self.topology, len(ids), self.vocab_size)

    # -- shared --------------------------------------------------------------------------------------------------

    def _input(
        self, batch: QuestionBatch, layout: str, microbatch: Microbatch, max_completion_tokens: int | None = None
    ) -> ModelInput:
        """Cut a microbatch from the data; costs look at completions only, whatever the loss covers."""
        for_costs = max_completion_tokens is not None
        options = {
            "max_completion_tokens": max_completion_tokens,
            "train_forking_token": self.config.data.train_forking_token and not for_costs,
            "loss_normalization": "token" if for_costs else self.config.training.loss_normalization,
            "pad_to_multiple": self._pad_to_multiple,
        }
        if layout != "padded":
            return build_stream(batch, microbatch, self.tags, share_prompt=layout == "packed", **options)
        arrays = collate(batch, microbatch, self.tags, **options)
        if self.topology.cp_size > 1:
            arrays = context_parallel_share(arrays, self.topology.cp_rank, self.topology.cp_size)
        return rows_input(arrays)

    @property
    def _pad_to_multiple(self) -> int:
        """Sequence parallelism splits a sequence over TP ranks, context parallelism into 2 pieces a rank."""
        multiple = self.topology.tp_size if self.config.parallel.sequence_parallel else 1
        return multiple * (2 * self.topology.cp_size if self.topology.cp_size > 1 else 1)

    def _forward(self, model: torch.nn.Module, model_input: ModelInput) -> Tensor:
        """Run a microbatch. What the layers need is made here, once, by every stage for itself, from the plan."""
        arrays = (model_input.tokens, model_input.position_ids, model_input.scored, model_input.targets)
        stream = None
        if model_input.segments is not None:
            stream = self.attention.stream(model_input.segments, model_input.tokens.shape[1])
        tensors = (torch.from_numpy(a).to(self.topology.device, non_blocking=True) for a in arrays)
        return model(*tensors, stream)

    def _schedule(self, step: object, plan: MicrobatchPlan, **kwargs: object) -> None:
        """Run Megatron's schedule for this layout; every model chunk draws the microbatches in the same order."""
        microbatches = plan.ranks[self.topology.dp_rank]
        rows = len(microbatches[0].sequences) if plan.layout == "padded" else 1
        longest = max(m.size.tokens for m in microbatches) // rows  # a hint: every microbatch tells its own shape
        self._run_schedule(step, microbatches, longest, rows, **kwargs)

    def _run_schedule(
        self, step: object, microbatches: Sequence[object], seq_length: int, micro_batch_size: int, **kwargs: object
    ) -> None:
        modules = self.wrapped or self.chunks
        data = [iter(microbatches) for _ in modules]
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=data if len(data) > 1 else data[0],
            model=modules if len(modules) > 1 else modules[0],
            num_microbatches=len(microbatches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            **kwargs,
        )
