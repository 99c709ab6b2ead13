"""Sends between pipeline stages whose shapes come from the plan, so that no stage asks its neighbour for them.

Microbatches differ in length. megatron-core has every stage tell the next one the shape of what it will send, and waits
for the device at each of these messages. Here every rank knows the plan, and with it all shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Shape = tuple[int, int, int]
"""(tokens on this rank, rows, channels) of hidden states, and of their gradients."""
_NOTHING: Shape = (0, 0, 0)


class PlannedCommunicator(P2PCommunicator):
    """Sends and receives of one pass of the schedule over microbatches."""

    def __init__(self, core: TransformerConfig, shapes: Sequence[Shape]) -> None:
        """`shapes`: of what passes between stages, for every microbatch in the order of the plan."""
        super().__init__(pp_group=parallel_state.get_pipeline_model_parallel_group(), config=core)
        first, last = self.pp_group.rank() == 0, self.pp_group.rank() == self.pp_group.size() - 1
        chunks = core.virtual_pipeline_model_parallel_size or 1
        self._from_previous = iter([shapes[i] for i in received_microbatches(core, len(shapes), chunks, first)])
        self._from_next = iter([shapes[i] for i in received_microbatches(core, len(shapes), chunks, last)])

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        """Shapes of what comes from the previous stage and from the next one; megatron-core's communicator asks."""
        return next(self._from_previous) if recv_prev else _NOTHING, next(self._from_next) if recv_next else _NOTHING


def received_microbatches(core: TransformerConfig, count: int, chunks: int, at_the_edge: bool) -> list[int]:
    """Numbers of the microbatches that come from one neighbour, in the order in which they come.

    Args:
        count: microbatches of the pass.
        chunks: model chunks per stage.
        at_the_edge: no earlier stage is there, in the direction of the pass: only later chunks receive, from the stage
            at the other end.
    """
    table = get_schedule_table(count, chunks, core.microbatch_group_size_per_vp_stage if chunks > 1 else count)
    return [microbatch for microbatch, chunk in table if chunk > 0 or not at_the_edge]


def schedule_groups() -> ProcessGroupCollection:
    """The groups that megatron-core's schedule takes where it is given a communicator: its own."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return groups
