"""What a plan has to keep to: ranks, microbatch counts, how much a microbatch holds, how sequences stand in it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.records import PlanLayout
from megatron_ssft.scheduling.pipeline_time import Pipeline

SMALLEST_STREAM = 1024
"""Tokens. Streams are not divided into smaller ones to fill a pipeline: small matrix products are slow."""


@dataclass(frozen=True)
class RowLimits:
    """Limits of the padded layout, in which a sequence is a row."""

    num_ranks: int
    """R, data-parallel ranks."""
    micro_batch_size: int = 1
    """b, sequences in a training microbatch."""
    max_tokens: int = 1
    """Padded tokens (rows x longest) in a microbatch of the cost pass; one longer sequence may stand alone."""
    group_size: int = 1
    """v, to which the virtual pipeline needs the microbatches per rank to be a multiple; 1 without one."""
    pipeline: Pipeline = Pipeline()
    """Which order of its microbatches is the best on a rank."""


@dataclass(frozen=True)
class StreamLayout:
    """How the sequences of a microbatch stand in its token stream."""

    share_prompt: bool = True
    """Sequences of a question share its prompt, those of a tag also the tag; else each has its own."""
    one_question: bool = False
    """A token stream holds sequences of one question only."""

    @property
    def name(self) -> PlanLayout:
        """The plan's `layout`, from which the engine builds the stream."""
        return "packed" if self.share_prompt else "unshared"


PACKED = StreamLayout()
"""`--sequence-layout packed`: what fits into a stream stands in it."""
CONCATENATED = StreamLayout(one_question=True)
"""`--sequence-layout concatenated`: the traces of one question one after the other (paper, appendix A.5)."""


@dataclass(frozen=True)
class StreamLimits:
    """Limits of token streams."""

    num_ranks: int
    """R, data-parallel ranks."""
    max_tokens: int
    """Tokens in a stream; one longer sequence may stand alone."""
    group_size: int = 1
    """v, to which the virtual pipeline needs the streams per rank to be a multiple; 1 without one."""
    equal_counts: bool = False
    """Training gives all ranks the same number of streams. The cost pass does so where `group_size` > 1."""
    min_microbatches: int = 1
    """Streams per rank that the cost pass makes if there are pairs enough, to keep a pipeline filled."""
    pipeline: Pipeline = Pipeline()
    """What a rank's streams go through; more than one stage is to be kept busy."""
    smallest_stream: int = SMALLEST_STREAM
    """Tokens in a stream that comes of keeping it busy."""
    layout: StreamLayout = PACKED
    search_effort: int = 200_000
    """Streams that the search for a packing without PADs looks at before it gives up (200,000 take some 30 ms)."""
