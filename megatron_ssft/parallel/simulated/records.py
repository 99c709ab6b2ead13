"""What is counted in a step. Plain records, which `dataclasses.asdict` and `json` can spell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ssft.parallel.simulated.sites import Site

Part = Literal["weights", "gradients", "optimizer", "activations", "loss head", "communication", "other"]
"""What memory is for. `activations`: hidden states and their gradients, kept or passing. `loss head`: chunks of logits
and what is computed from them. `communication`: buffers to gather into and to receive into. `other`: the inputs."""
PARTS: tuple[Part, ...] = (
    "weights", "gradients", "optimizer", "activations", "loss head", "communication", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Memory of one rank's GPU, in bytes; each tensor's storage is rounded up to 512 bytes, as torch's allocator does.

    What libraries, the CUDA context and fragmentation take is not in it.
    """

    peak: int
    """Most bytes alive at once."""
    after: int
    """Bytes alive at the end."""
    peak_parts: dict[Part, int]
    """At the peak: bytes by what they are for."""
    after_parts: dict[Part, int]
    peak_sites: tuple[tuple[str, int], ...]
    """At the peak: (file:line that made them, bytes), the most first."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products on one rank, 2 for a multiply-add; attention counts pairs that the mask lets see."""

    forward: float
    backward: float
    """Gradients of inputs and of weights."""
    recomputed: float
    """Forward passes that the backward pass repeats: recomputed layers, and the logits."""

    @property
    def model(self) -> float:
        """Those that the method needs, as model FLOPs utilisation counts them."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Collective:
    """Messages of one kind over one group."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, broadcast, send, receive or barrier."""
    group: str
    """tensor, pipeline, data, ... : what the ranks of the group share or divide."""
    ranks: int
    """In the group."""
    between_nodes: bool
    """Whether they are on several nodes; for send and receive, whether the two are."""
    count: int
    bytes: int
    """Of all messages: of the whole tensor, for all_gather the gathered one, for reduce_scatter the one before."""


@dataclass(frozen=True)
class Copies:
    """Copies between host memory and the GPU's, in one direction."""

    count: int
    bytes: int
    blocking: int
    """How many of them the host waits for: not asked to be asynchronous, or from memory that is not page-locked."""


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the GPU."""

    what: str
    """copy to the host, item, blocking copy, torch.cuda.synchronize, ..."""
    site: Site
    count: int


@dataclass(frozen=True)
class Section:
    """A part of a step on one rank, or what is done with a checkpoint."""

    name: str
    """scoring: a forward pass; training: a training pass with its optimizer step; between: what is done outside of the
    two; loading, saving, saving in the background, exporting: of a checkpoint."""
    memory: Memory
    flops: Flops
    collectives: tuple[Collective, ...]
    copies: Copies
    """From the host to the GPU."""
    copies_to_host: Copies
    staged: int
    """Most bytes that stood in host memory at once on their way from the GPU, or from a file to it."""
    waits: tuple[Wait, ...]
    operations: int
    """Calls of torch's operators."""
    seconds: float
    """That running it took here, which says nothing about a GPU."""


@dataclass(frozen=True)
class SimulatedStep:
    """One step of one rank."""

    rank: int
    world_size: int
    parameters: int
    """On this rank."""
    process_groups: int
    """Made at the start, by all ranks together."""
    attention: str
    """The kernel for token streams."""
    sections: tuple[Section, ...]
    """In the order in which they ran."""
    checkpoint: tuple[Section, ...] = ()
    """Loading and saving, where that was asked for. They are no part of the step: neither is what they take."""

    @property
    def peak(self) -> int:
        """Most bytes alive at once in the step."""
        return max(section.memory.peak for section in self.sections)

    @property
    def between_steps(self) -> int:
        """Bytes alive when the step is over."""
        return self.sections[-1].memory.after

    def section(self, name: str) -> Section:
        """The section of this name, the last one if there are several."""
        return next(section for section in reversed(self.sections + self.checkpoint) if section.name == name)
