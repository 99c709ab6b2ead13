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
from megatron_ssft.layouts.packed import build_stream
from megatron_ssft.layouts.padded import collate, context_parallel_share, rows_input
from megatron_ssft.parallel.attention.kernels import AttentionBackend, choose_backend
from megatron_ssft.parallel.collectives import collect_logits, sum_over_ranks
from megatron_ssft.parallel.loss_terms import LossTerm, weighted_nll
from megatron_ssft.parallel.model.gpt import SetGPTModel, build_model_chunks
from megatron_ssft.parallel.model.trainable import freeze
from megatron_ssft.parallel.optimizer import build_optimizer, finalize_gradients, set_hyperparameters, wrap_chunks
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import (
    ForkingTokens,
    Microbatch,
    MicrobatchPlan,
    ModelInput,
    QuestionBatch,
    SequenceSpec,
    StepMetrics,
)
from megatron_ssft.scheduling.sequences import distinct_traces

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
        self.last_layers: int | None = None
        """How many of the last layers train; None: everything."""

    def start(self, last_layers: int | None = None) -> None:
        """Wrap the model and build the optimizer from the weights it now holds.

        `last_layers`: how many of the last layers train, beside the tags' rows; None: everything.
        """
        self.last_layers = last_layers
        freeze(self.chunks, self.config.model.num_layers, last_layers)
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
        cut = partial(self._input, batch, plan.layout, self.tags, max_completion_tokens=matching_tokens)
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
        cut = partial(self._input, batch, plan.layout, self.tags, **self._training_options)
        for _, model_input, nll in self._forward_only(plan, cut):
            loss += float((nll * model_input.weights.astype(np.float64)).sum())
        return float(sum_over_ranks(np.array([loss]), self.topology)[0] / denominator)

    def sequence_nll(self, batch: QuestionBatch, plan: MicrobatchPlan, tags: ForkingTokens) -> list[np.ndarray]:
        """Q arrays float64 [M]: NLL of every completion of the plan, summed over its tokens; the same on all ranks."""
        sums = np.zeros(batch.num_traces)
        first = np.cumsum([0] + [s.num_traces for s in batch.sets])
        for microbatch, model_input, nll in self._forward_only(plan, self._completions(batch, plan, tags)):
            totals = np.bincount(model_input.owner, weights=nll, minlength=len(microbatch.sequences))
            for spec, total in zip(microbatch.sequences, totals):
                if not spec.is_pad:
                    sums[first[spec.question] + spec.trace] += total
        return np.split(sum_over_ranks(sums, self.topology), first[1:-1])

    def token_outputs(
        self, batch: QuestionBatch, plan: MicrobatchPlan, tags: ForkingTokens, top_k: int | None
    ) -> list[tuple[SequenceSpec, np.ndarray]]:
        """(sequence, float64 [L] or [L, 1 + 2 k]) for this rank's share of the plan; none on ranks without a loss.

        NLL of each completion token; with `top_k` also the k largest log-probabilities at its place and their ids.
        """
        answers = self._forward_only(plan, self._completions(batch, plan, tags), top_k=top_k)
        return [
            (spec, output[model_input.owner == place])
            for microbatch, model_input, output in answers
            for place, spec in enumerate(microbatch.sequences)
            if not spec.is_pad
        ]

    def _completions(self, batch: QuestionBatch, plan: MicrobatchPlan, tags: ForkingTokens) -> Cut:
        """Cuts microbatches whose scored places are those of the completions' tokens."""
        return partial(self._input, batch, plan.layout, tags)

    def _forward_only(
        self, plan: MicrobatchPlan, cut: Cut, low_precision: bool = False, top_k: int | None = None
    ) -> list[tuple[Microbatch, ModelInput, np.ndarray]]:
        """(microbatch, its input, float64 answer) for this rank's share; empty on ranks that report no loss.

        The answer is [n] NLL, with `top_k` [n, 1 + 2 k].
        """
        outputs: list[tuple[Microbatch, ModelInput, Tensor]] = []

        def keep(microbatch: Microbatch, model_input: ModelInput, output: Tensor, non_loss_data: bool = True) -> None:
            if self.topology.reports_loss:
                outputs.append((microbatch, model_input, output.detach()))

        def step(data: Iterator[tuple[int, Microbatch]], model: torch.nn.Module) -> tuple[Tensor, object]:
            _, microbatch = next(data)
            model_input = cut(microbatch)
            return self._forward(model, model_input, top_k), partial(keep, microbatch, model_input)

        for chunk in self.wrapped:
            chunk.eval()
        device = self.topology.device.type
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=low_precision):
            self._schedule(step, [plan], forward_only=True, collect_non_loss_data=True)
        return [(m, i, output.double().cpu().numpy()) for m, i, output in outputs]  # after the last is under way

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, batch: QuestionBatch, plan: MicrobatchPlan, denominator: float, lr: float) -> StepMetrics:
        """One optimizer step on sum(weight x NLL) / denominator over the whole global batch. As `train_terms`."""

        def prepare(microbatch: Microbatch, model_input: ModelInput) -> tuple[ModelInput, tuple[np.ndarray]]:
            return model_input, (model_input.weights / np.float32(denominator),)

        options = self._training_options
        return self.train_terms([LossTerm(batch, plan, self.tags, prepare, weighted_nll, options=options)], lr)

    def train_terms(self, terms: Sequence[LossTerm], lr: float) -> StepMetrics:
        """One optimizer step on the sum of the terms.

        Weights in the terms are final: dividing them beforehand, rather than gradients later, makes loss and gradient
        independent of micro-batch size, accumulation and layout.

        Raises:
            UserError: the loss or the gradient is not finite; the weights are left as they were for a bad loss.
        """
        device = self.topology.device
        names = list(dict.fromkeys(name for term in terms for name in term.figures))
        sums = torch.zeros(2 + len(names), dtype=torch.float64, device=device)  # no host sync within the step
        places = [torch.tensor([2 + names.index(n) for n in t.figures], device=device, dtype=torch.long) for t in terms]

        def loss_of(term: int, inputs: list[Tensor], output: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss, figures = terms[term].loss(output, *inputs)
            if self.topology.reports_loss:
                sums[0] += loss.detach()
                sums[1] += len(output)
                sums.index_add_(0, places[term], figures)
            # Zero tokens tell Megatron to leave the gradients as they are: they are normalised already.
            return loss, torch.zeros([], dtype=torch.int, device=device), {}

        def step(data: Iterator[tuple[int, Microbatch]], model: torch.nn.Module) -> tuple[Tensor, object]:
            which, microbatch = next(data)
            term = terms[which]
            model_input = self._input(term.batch, term.plan.layout, term.tags, microbatch, **term.options)
            arrays: tuple[np.ndarray, ...] = ()
            if self.topology.is_last_stage:  # the others have no loss
                model_input, arrays = term.prepare(microbatch, model_input)
            # Before the forward pass, which copies would wait for.
            inputs = [torch.from_numpy(a).to(device, non_blocking=True) for a in arrays]
            return self._forward(model, model_input), partial(loss_of, which, inputs)

        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._schedule(step, [term.plan for term in terms], forward_only=False)
        loss, tokens, *figures = sum_over_ranks(sums.cpu().numpy(), self.topology)
        where = terms[0].batch.sets[0].where
        if not np.isfinite(loss):
            raise UserError(f"{where}: the loss of the step that starts with this question is {loss}")
        set_hyperparameters(self.optimizer, self.config, lr)
        _, grad_norm, _ = self.optimizer.step()
        if not np.isfinite(grad_norm):
            raise UserError(f"{where}: the gradient of the step that starts with this question is not finite")
        return StepMetrics(
            loss=float(loss),
            grad_norm=float(grad_norm),
            trained_sequences=sum(len(term.plan.sequences) for term in terms),
            trained_tokens=int(tokens),
            figures=dict(zip(names, map(float, figures))),
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
        self,
        batch: QuestionBatch,
        layout: str,
        tags: ForkingTokens,
        microbatch: Microbatch,
        *,
        max_completion_tokens: int | None = None,
        train_forking_token: bool = False,
        loss_normalization: str = "token",
    ) -> ModelInput:
        """Cut a microbatch from the data. By default completions are scored, and nothing else."""
        options = {
            "max_completion_tokens": max_completion_tokens,
            "train_forking_token": train_forking_token,
            "loss_normalization": loss_normalization,
            "pad_to_multiple": self._pad_to_multiple,
        }
        if layout != "padded":
            return build_stream(batch, microbatch, tags, share_prompt=layout == "packed", **options)
        arrays = collate(batch, microbatch, tags, **options)
        if self.topology.cp_size > 1:
            arrays = context_parallel_share(arrays, self.topology.cp_rank, self.topology.cp_size)
        return rows_input(arrays)

    @property
    def _training_options(self) -> dict[str, object]:
        return {
            "train_forking_token": self.config.data.train_forking_token,
            "loss_normalization": self.config.training.loss_normalization,
        }

    @property
    def _pad_to_multiple(self) -> int:
        """Sequence parallelism splits a sequence over TP ranks, context parallelism into 2 pieces a rank."""
        multiple = self.topology.tp_size if self.config.parallel.sequence_parallel else 1
        return multiple * (2 * self.topology.cp_size if self.topology.cp_size > 1 else 1)

    def _forward(self, model: torch.nn.Module, model_input: ModelInput, top_k: int | None = None) -> Tensor:
        """Run a microbatch. What the layers need is made here, once, by every stage for itself, from the plan."""
        arrays = (model_input.tokens, model_input.position_ids, model_input.scored, model_input.targets)
        stream = None
        if model_input.segments is not None:
            stream = self.attention.stream(model_input.segments, model_input.tokens.shape[1])
        tensors = (torch.from_numpy(a).to(self.topology.device, non_blocking=True) for a in arrays)
        return model(*tensors, stream, top_k)

    def _schedule(self, step: object, plans: Sequence[MicrobatchPlan], **kwargs: object) -> None:
        """Run Megatron's schedule for this layout over (number of the plan, microbatch), one plan after the other.

        Every model chunk draws the microbatches in the same order.
        """
        mine = [(number, mb) for number, plan in enumerate(plans) for mb in plan.ranks[self.topology.dp_rank]]
        # Hints only: every microbatch tells its own shape.
        rows = len(mine[0][1].sequences) if plans[0].layout == "padded" else 1
        longest = max(microbatch.size.tokens for _, microbatch in mine) // rows
        self._run_schedule(step, mine, longest, rows, **kwargs)

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
