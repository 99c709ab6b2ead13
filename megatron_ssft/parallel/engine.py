"""Executes planned batches on the model: `score` without gradients, `train` for one optimizer step.

It knows no objective: what is scored and what is trained are its callers' decisions. Every rank holds the same plan
and cuts its own microbatches from the data on the disk, so nothing but activations, gradients and one vector of sums
travels between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ssft.config import RunConfig
from megatron_ssft.layouts.cut import cut_microbatch
from megatron_ssft.parallel.attention.choice import AttentionBackend, choose_backend
from megatron_ssft.parallel.collectives import collect_logits, raise_together, sum_over_ranks
from megatron_ssft.parallel.device import autocast_type, to_device
from megatron_ssft.parallel.device_defaults import decided
from megatron_ssft.parallel.finite import (
    LOWER_LR,
    find_damaged_weight,
    microbatches_of,
    refuse_bad_gradient,
    refuse_bad_loss,
)
from megatron_ssft.parallel.loss_terms import LossTerm
from megatron_ssft.parallel.model.gpt import SetGPTModel, build_model_chunks
from megatron_ssft.parallel.model.initialization import fold_forking_rows
from megatron_ssft.parallel.model.trainable import freeze
from megatron_ssft.parallel.optimizer import (
    build_optimizer,
    finalize_gradients,
    gather_parameters,
    set_hyperparameters,
    wrap_chunks,
)
from megatron_ssft.parallel.own_work import OwnWork
from megatron_ssft.parallel.pipeline import PlannedCommunicator, schedule_groups
from megatron_ssft.parallel.scores import ScoredMicrobatch, Scores
from megatron_ssft.parallel.step_clock import StepClock
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import Microbatch, ModelInput, PlannedBatch, StepMetrics

Step = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, object]]
"""Megatron's forward step: (microbatches, model chunk) -> (output, loss function)."""


class Engine:
    """The model of this rank and everything that runs on it."""

    def __init__(self, config: RunConfig, topology: Topology, vocab_size: int, forking_rows: Sequence[int]) -> None:
        """Build the model without weights; `start` makes it trainable.

        Args:
            vocab_size: vocabulary entries in use.
            forking_rows: vocabulary rows whose input embeddings are a parameter of their own.
        """
        self.config = config = decided(config, topology.device.type != "cpu")
        self.topology = topology
        self.vocab_size = vocab_size
        self.clock = StepClock()
        """Where this rank's time goes."""
        self.own_work = OwnWork(topology.device)
        """How long it scores and trains, without waiting for other ranks."""
        self.chunks: list[SetGPTModel] = build_model_chunks(config, vocab_size, tuple(forking_rows))
        for chunk in self.chunks:
            chunk.to(topology.device)
        self.attention = self._choose_attention()
        self.wrapped: list[DistributedDataParallel] = []
        self._optimizer: MegatronOptimizer | None = None
        self.last_layers: int | None = None
        """How many of the last layers train; None: everything."""

    def start(self, last_layers: int | None = None) -> None:
        """Wrap the model and build the optimizer from the weights it now holds.

        `last_layers`: how many of the last layers train, beside the tags' rows; None: everything.
        """
        self.last_layers = last_layers
        freeze(self.chunks, self.config.model.num_layers, last_layers)
        self.wrapped = wrap_chunks(self.chunks, self.config)
        self._optimizer = build_optimizer(self.wrapped, self.config)
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
            deterministic=self.config.parallel.deterministic_mode,
        )

    @property
    def is_started(self) -> bool:
        """Whether there is an optimizer, so that the model can be trained."""
        return self._optimizer is not None

    @property
    def optimizer(self) -> MegatronOptimizer:
        """The optimizer of a started engine."""
        assert self._optimizer is not None, "the engine is not started"
        return self._optimizer

    @property
    def num_parameters(self) -> int:
        """Parameters on this rank."""
        return sum(p.numel() for chunk in self.chunks for p in chunk.parameters())

    def fold_forking_rows(self) -> None:
        """Bring the weights up to date, and the tags' rows to where readers of a model expect them. Collective.

        Called before weights are read elsewhere than in a forward pass.
        """
        gather_parameters(self.wrapped)
        fold_forking_rows(self.chunks)

    # -- scoring -------------------------------------------------------------------------------------------------

    def score(self, planned: PlannedBatch, *, top_k: int | None = None, low_precision: bool = False) -> Scores:
        """Likelihoods of the scored tokens under the present weights, without a gradient. Collective.

        Args:
            top_k: also give the k most probable tokens at each scored place.
            low_precision: run a float32 model in bfloat16 autocast.
        """
        with self.own_work.counting(), self.topology.watch.phase("scoring"):
            share = self._forward_only(planned, top_k, low_precision)
        return Scores(planned, share, self.topology)

    def _forward_only(self, planned: PlannedBatch, top_k: int | None, low_precision: bool) -> list[ScoredMicrobatch]:
        """This rank's microbatches, scored; empty on ranks that report no loss."""
        outputs: list[tuple[Microbatch, ModelInput, Tensor]] = []

        def keep(microbatch: Microbatch, model_input: ModelInput, output: Tensor, non_loss_data: bool = True) -> None:
            if self.topology.reports_loss:
                outputs.append((microbatch, model_input, output.detach()))

        def step(data: Iterator[tuple[int, Microbatch]], model: torch.nn.Module) -> tuple[Tensor, object]:
            _, microbatch = next(data)
            self.topology.watch.moved()
            model_input = self._input(planned, microbatch)
            return self._forward(model, model_input, top_k), partial(keep, microbatch, model_input)

        for chunk in self.wrapped:
            chunk.eval()
        device = autocast_type(self.topology.device)
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=low_precision):
            self._schedule(step, [planned], forward_only=True, collect_non_loss_data=True)
        if not outputs:
            return []
        # Copied to the host only now that the last microbatch is under way, and all at once.
        values = torch.cat([output.double() for _, _, output in outputs]).cpu().numpy()
        ends = np.cumsum([len(output) for _, _, output in outputs])
        return [ScoredMicrobatch(m, i, part) for (m, i, _), part in zip(outputs, np.split(values, ends[:-1]))]

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, terms: Sequence[LossTerm], lr: float) -> StepMetrics:
        """One optimizer step on the sum of the terms, see `_train`. Collective."""
        with self.clock.part("forward_backward"), self.own_work.counting(), self.topology.watch.phase("training"):
            return self._train(terms, lr)

    def _train(self, terms: Sequence[LossTerm], lr: float) -> StepMetrics:
        """One optimizer step on the sum of the terms. Collective.

        Weights in the terms are final: dividing them beforehand, rather than gradients later, makes loss and gradient
        independent of micro-batch size, accumulation and parallel layout.

        Raises:
            UserError: loss, gradient or the new weights are not finite; the weights are left as they were for a bad
                loss.
        """
        device = self.topology.device
        names = list(dict.fromkeys(name for term in terms for name in term.figures))
        slots = {(i, id(mb)): 2 + len(names) + k for k, (i, mb) in enumerate(microbatches_of(terms))}
        sums = torch.zeros(2 + len(names) + len(slots), dtype=torch.float64, device=device)  # no host sync in the step
        numbers = [torch.tensor([2 + names.index(name) for name in term.figures], dtype=torch.long) for term in terms]
        places = [to_device(each, device) for each in numbers]

        def loss_of(term: int, slot: int, inputs: list[Tensor], output: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss, figures = terms[term].loss(output, *inputs)
            if self.topology.reports_loss:
                sums[0] += loss.detach()
                sums[1] += len(output)
                sums[slot] += ~loss.detach().isfinite()
                sums[places[term]] += figures  # names of a term are different ones
            # Zero tokens tell Megatron to leave the gradients as they are: they are normalised already.
            return loss, torch.zeros([], dtype=torch.int, device=device), {}

        def step(data: Iterator[tuple[int, Microbatch]], model: torch.nn.Module) -> tuple[Tensor, object]:
            which, microbatch = next(data)
            self.topology.watch.moved()
            term = terms[which]
            model_input = self._input(term.planned, microbatch)
            arrays: tuple[np.ndarray, ...] = ()
            if self.topology.is_last_stage:  # the others have no loss
                model_input, arrays = term.prepare(microbatch, model_input)
            # Before the forward pass, which copies would wait for.
            inputs = [to_device(a, device) for a in arrays]
            return self._forward(model, model_input), partial(loss_of, which, slots[which, id(microbatch)], inputs)

        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._schedule(step, [term.planned for term in terms], forward_only=False)
        loss, tokens, *rest = sum_over_ranks(sums, self.topology)
        refuse_bad_loss(loss, rest[len(names) :], terms)
        with self.clock.part("optimizer"):
            grad_norm = self._optimizer_step(terms, lr)
        return StepMetrics(
            loss=float(loss),
            grad_norm=grad_norm,
            trained_sequences=sum(len(term.planned.plan.sequences) for term in terms),
            trained_tokens=int(tokens),
            figures=dict(zip(names, map(float, rest))),
        )

    def _optimizer_step(self, terms: Sequence[LossTerm], lr: float) -> float:
        """Change the weights; the gradient's norm. Raises UserError where it or they are not finite."""
        set_hyperparameters(self.optimizer, self.config, lr)
        _, grad_norm, _ = self.optimizer.step()
        refuse_bad_gradient(grad_norm, terms)
        damaged = find_damaged_weight(self.chunks)  # reads them, so that a GPU has done all of the step by now
        raise_together(damaged and f"{damaged}: is not finite after the step; {LOWER_LR}", self.topology)
        return float(grad_norm)

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
        shares: list[Tensor] = []

        def step(data: Iterator[int], model: torch.nn.Module) -> tuple[Tensor, object]:
            next(data)
            scored = torch.arange(len(ids), device=device)
            return model(tokens, positions, scored, None), lambda output, non_loss_data=True: shares.append(output)

        with torch.no_grad():
            copies = range(self.config.parallel.pipeline_model_parallel_size)  # the interleaved schedule needs a group
            inputs = [(1, len(padded))] * len(copies)
            self._run_schedule(step, copies, inputs, forward_only=True, collect_non_loss_data=True)
        share = shares[0] if shares else None
        return collect_logits(share, self.topology, len(ids), self.vocab_size)

    # -- shared --------------------------------------------------------------------------------------------------

    def _input(self, planned: PlannedBatch, microbatch: Microbatch) -> ModelInput:
        """Cut a microbatch from the data."""
        model_input = cut_microbatch(
            planned,
            microbatch,
            pad_to_multiple=self._pad_to_multiple,
            context_rank=self.topology.cp_rank,
            context_size=self.topology.cp_size,
        )
        rows, length = self._input_shape(planned, microbatch)
        assert model_input.tokens.shape == (rows, length // self.topology.cp_size), "the plan gives another shape"
        return model_input

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
        tensors = (to_device(a, self.topology.device) for a in arrays)
        return model(*tensors, stream, top_k)

    def _schedule(self, step: Step, batches: Sequence[PlannedBatch], **kwargs: bool) -> None:
        """Run Megatron's schedule over (number of the batch, microbatch), one batch after the other.

        Every model chunk draws the microbatches in the same order.
        """
        rank = self.topology.dp_rank
        microbatches = [(number, mb) for number, planned in enumerate(batches) for mb in planned.plan.ranks[rank]]
        inputs = [self._input_shape(batches[number], microbatch) for number, microbatch in microbatches]
        self._run_schedule(step, microbatches, inputs, **kwargs)

    def _input_shape(self, planned: PlannedBatch, microbatch: Microbatch) -> tuple[int, int]:
        """(rows, tokens in each) that a microbatch has as the model's input, of all context-parallel ranks."""
        rows = len(microbatch.sequences) if planned.plan.layout == "padded" else 1
        length, multiple = microbatch.size.tokens // rows, self._pad_to_multiple
        return rows, -(-length // multiple) * multiple

    def _run_schedule(
        self, step: Step, microbatches: Sequence[object], inputs: Sequence[tuple[int, int]], **kwargs: Any
    ) -> None:
        """`inputs`: (rows, tokens in each) of every microbatch, from which stages know what they receive."""
        modules = self.wrapped or self.chunks
        data = [iter(microbatches) for _ in modules]
        parallel, core = self.config.parallel, self.chunks[0].config
        if parallel.pipeline_model_parallel_size > 1:
            shares = self.topology.cp_size * (self.topology.tp_size if parallel.sequence_parallel else 1)
            shapes = [(length // shares, rows, core.hidden_size) for rows, length in inputs]
            kwargs |= {"p2p_communicator": PlannedCommunicator(core, shapes), "pg_collection": schedule_groups()}
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=data if len(data) > 1 else data[0],
            model=modules if len(modules) > 1 else modules[0],
            num_microbatches=len(microbatches),
            seq_length=inputs[0][1],  # these two are for shapes that are not asked for
            micro_batch_size=inputs[0][0],
            **kwargs,
        )
