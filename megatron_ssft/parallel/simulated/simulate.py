"""Runs the real step of one rank of a job of any size in this process, without a GPU and without its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.cuda_calls import CudaCalls
from megatron_ssft.parallel.device_defaults import decided
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.loss_terms import LossTerm
from megatron_ssft.parallel.model import loss_head
from megatron_ssft.parallel.optimizer import allocate_state, state_tensors
from megatron_ssft.parallel.scores import Scores
from megatron_ssft.parallel.simulated.checkpoints import simulate_export, simulate_load, simulate_save
from megatron_ssft.parallel.simulated.counters import Counters
from megatron_ssft.parallel.simulated.gpu import GPU, Kind, SimulatedGpu
from megatron_ssft.parallel.simulated.groups import simulated_groups
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import PlannedBatch, StepMetrics

AUTOCAST = (
    "--matching-precision bf16: torch's autocast, which runs a float32 model in bfloat16, has no form for a simulated "
    "GPU; simulate --matching-precision model, or --bf16"
)
Step = Callable[["CountedEngine"], object]
"""One step of training on an engine: it scores and trains."""


class CountedEngine(Engine):
    """An engine whose passes become sections of what is counted."""

    def __init__(
        self, config: RunConfig, topology: Topology, vocab_size: int, forking_rows: Sequence[int], counters: Counters
    ) -> None:
        """Called inside the `with` block of the counters."""
        self._counters = counters
        counters.memory.usual_part = "weights"
        super().__init__(config, topology, vocab_size, forking_rows)

    def start(self, last_layers: int | None = None) -> None:
        """As the engine does, with the optimizer's state in place, as after a first step."""
        super().start(last_layers)
        self.own_work.start()  # as in a run
        allocate_state(self.optimizer)
        loss_head.sums_stay_float32(self.topology.device)  # tried once in a run, not in every step
        memory = self._counters.memory
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                memory.is_for(parameter, "weights")
        for wrapped in self.wrapped:
            for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
                memory.is_for(buffer.grad_data, "gradients")
        for tensor in state_tensors(self.optimizer):
            memory.is_for(tensor, "optimizer")
        memory.usual_part = "activations"

    def score(self, planned: PlannedBatch, *, top_k: int | None = None, low_precision: bool = False) -> Scores:
        if low_precision and isinstance(self._counters, SimulatedGpu):
            raise UserError(AUTOCAST)
        with self._counters.section("scoring"):
            return super().score(planned, top_k=top_k, low_precision=low_precision)

    def train(self, terms: Sequence[LossTerm], lr: float) -> StepMetrics:
        with self._counters.section("training"):
            return super().train(terms, lr)

    def save_and_load(self) -> None:
        """Save what a run saves, in the foreground and in the background, export the weights, and load all again."""
        with self._counters.section("saving"):
            common = simulate_save(self)
        with self._counters.section("saving in the background"):
            simulate_save(self, in_background=True)
        with self._counters.section("exporting"):
            simulate_export(self)
        with self._counters.section("loading"):
            simulate_load(self, common, self._counters.staged)

    def account(self, process_groups: int, *, with_checkpoint: bool = False) -> SimulatedStep:
        """What the sections since the last account counted.

        `with_checkpoint`: save and load as well, after the step.
        """
        step = self._counters.take_sections()
        if with_checkpoint:
            self.save_and_load()
        return SimulatedStep(
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            parameters=self.num_parameters,
            process_groups=process_groups,
            attention=self.attention.name,
            sections=step,
            checkpoint=self._counters.take_sections(),
        )


@dataclass(frozen=True)
class SimulatedRank:
    """One rank of a job that is not there."""

    config: RunConfig
    topology: Topology
    gpu: SimulatedGpu
    process_groups: int
    """Made by all ranks together."""

    def engine(self, vocab_size: int, forking_rows: Sequence[int]) -> CountedEngine:
        """This rank's part of the model, without weights; `start` makes it trainable."""
        return CountedEngine(self.config, self.topology, vocab_size, forking_rows, self.gpu)


@contextlib.contextmanager
def simulated_rank(
    config: RunConfig, world_size: int, rank: int, *, kind: Kind = "gpu", nodes_of: int = 8
) -> Iterator[SimulatedRank]:
    """Inside the `with` block this process is rank `rank` of `world_size`, and its GPU is simulated.

    No process group may be open. The block leaves none, and nothing else behind.

    Args:
        kind: whose kernels are simulated.
        nodes_of: ranks on a node.

    Raises:
        UserError: the ranks cannot be arranged so, or the configuration asks for what cannot be simulated.
    """
    _refuse_unknown(config)
    config = decided(config, on_gpu=kind == "gpu")
    gpu = SimulatedGpu(kind, nodes_of)
    with _cuda_is(gpu), gpu, simulated_groups(config, rank, world_size, GPU) as (topology, made):
        yield SimulatedRank(config, topology, gpu, made)


def simulate(
    config: RunConfig,
    world_size: int,
    rank: int,
    vocab_size: int,
    forking_rows: Sequence[int],
    step: Step,
    *,
    kind: Kind = "gpu",
    nodes_of: int = 8,
    with_checkpoint: bool = False,
) -> SimulatedStep:
    """One step of one rank.

    Args:
        vocab_size: vocabulary entries in use.
        forking_rows: vocabulary rows whose input embeddings are a parameter of their own.
        step: scores and trains, as often as a step does.
        kind, nodes_of: see `simulated_rank`.
        with_checkpoint: save, export and load as well, after the step.

    Raises:
        UserError: see `simulated_rank`.
        FaultOnGpu: an operator was given tensors of the host and of the GPU, or gives as many values as it finds.
    """
    with simulated_rank(config, world_size, rank, kind=kind, nodes_of=nodes_of) as simulated:
        engine = simulated.engine(vocab_size, forking_rows)
        engine.start()
        simulated.gpu.take_sections()
        step(engine)
        return engine.account(simulated.process_groups, with_checkpoint=with_checkpoint)


def _refuse_unknown(config: RunConfig) -> None:
    """Raise UserError for what the simulation has no answer to."""
    if config.model.transformer_impl != "local":
        raise UserError(
            "--transformer-impl transformer_engine: its kernels cannot be simulated; simulate --transformer-impl local"
        )


@contextlib.contextmanager
def _cuda_is(gpu: SimulatedGpu) -> Iterator[None]:
    """Inside the `with` block calls of CUDA go to the simulated GPU."""
    calls = CudaCalls(GPU, gpu.wait, _ANSWERS | gpu.answers(), gpu.pin)
    replaced = gpu.replacements()
    # Without apex and TransformerEngine megatron-core reads the norm of every gradient on the host.
    replaced.append((clip_grads, "l2_norm_impl", _l2_norm))
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replaced]
    for owner, name, answer in replaced:
        setattr(owner, name, answer)
    loss_head.sums_stay_float32.cache_clear()
    calls.install()
    try:
        yield
    finally:
        calls.remove()
        loss_head.sums_stay_float32.cache_clear()
        for owner, name, own in before:
            if own is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, own)


_ANSWERS: dict[str, object] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 8,
    "get_device_name": lambda device=None: "a simulated GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
    "is_current_stream_capturing": lambda: False,
}


def _l2_norm(chunk: int, overflow: Tensor, lists: list[list[Tensor]], *_: object) -> tuple[Tensor, None]:
    """The norm of all gradients in one kernel, as apex and TransformerEngine have it."""
    return torch.stack([torch.norm(tensor) for tensor in lists[0]]).norm().view(1), None
