"""The last step of every planner: microbatches of each rank become a plan with its figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from megatron_ssft.records import Microbatch, MicrobatchPlan, PlanLayout
from megatron_ssft.scheduling.limits import StreamLayout
from megatron_ssft.scheduling.pipeline_time import Pipeline
from megatron_ssft.scheduling.shared_nodes import StreamNodes
from megatron_ssft.scheduling.work import WorkModel


def assemble_plan(
    ranks: Sequence[Sequence[Microbatch]],
    work: WorkModel,
    *,
    layout: PlanLayout,
    pad_lower_bound: int,
    makespan_lower_bound: float,
    pipeline: Pipeline,
) -> MicrobatchPlan:
    """The plan in which rank r runs `ranks[r]`, in this order or, in a pipeline of several stages, in its best one.

    PADs, makespan and idle share are counted here.
    """
    if pipeline.stages > 1:
        ranks = [_in_order(microbatches, work, pipeline) for microbatches in ranks]
    makespan = max(math.fsum(work.of(microbatch.size) for microbatch in microbatches) for microbatches in ranks)
    return MicrobatchPlan(
        ranks=tuple(map(tuple, ranks)),
        pad_sequences=sum(s.is_pad for microbatches in ranks for mb in microbatches for s in mb.sequences),
        pad_lower_bound=pad_lower_bound,
        makespan=makespan,
        makespan_lower_bound=min(makespan, makespan_lower_bound),  # which is rounded
        layout=layout,
        idle_share=pipeline_idle_share([ranks], work, pipeline),
    )


def _in_order(microbatches: Sequence[Microbatch], work: WorkModel, pipeline: Pipeline) -> list[Microbatch]:
    return [microbatches[k] for k in pipeline.order([work.of(microbatch.size) for microbatch in microbatches])]


def pipeline_idle_share(plans: Sequence[Sequence[Sequence[Microbatch]]], work: WorkModel, pipeline: Pipeline) -> float:
    """Share of the stages' time, on all ranks, in which they wait for each other or for the rank that takes longest.

    Args:
        plans: the microbatches of each rank, of one plan or of several that go through the pipeline as one pass.
    """
    if pipeline.stages == 1:
        return 0.0
    works = [[work.of(mb.size) for ranks in plans for mb in ranks[rank]] for rank in range(len(plans[0]))]
    time = max(map(pipeline.time, works))
    busy = math.fsum(itertools.chain(*works)) * (1 + pipeline.backward_ratio) / pipeline.stages / len(works)
    return max(0.0, 1 - busy / time)


def assemble_streams(
    ranks: Sequence[Sequence[Microbatch]],
    nodes: StreamNodes,
    work: WorkModel,
    layout: StreamLayout,
    pad_lower_bound: int,
    pipeline: Pipeline,
) -> MicrobatchPlan:
    """The plan of these streams, each rank's heaviest first or in the order that suits its pipeline.

    No plan has a smaller makespan than max(work with every prompt and tag once / R, heaviest sequence).
    """
    bound = max(nodes.shared_once / len(ranks), float(nodes.alone_work.max())) * nodes.flops_per_unit
    return assemble_plan(
        [sorted(microbatches, key=lambda mb: -work.of(mb.size)) for microbatches in ranks],
        work,
        layout=layout.name,
        pad_lower_bound=pad_lower_bound,
        makespan_lower_bound=bound,
        pipeline=pipeline,
    )
