"""Shapes of what stages receive: those that the plan gives are those that the neighbour sends."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_ssft.parallel.pipeline import PlannedCommunicator
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, make_rows, train_and_tell, write_rows

PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "two stages": (2, PP2),
    "four stages": (4, {"pipeline_model_parallel_size": 4}),
    "two stages, rows": (2, PP2 | {"sequence_layout": "padded"}),
    "interleaved": (2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}),
    "interleaved, more microbatches": (2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 1}),
    "sequence parallel": (4, PP2 | {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "interleaved, sequence parallel": (
        4,
        PP2 | {"num_layers_per_virtual_pipeline_stage": 1, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def data_in(folder):
    return {"data_path": [write_rows(folder / "train.jsonl", make_rows())], "data_cache_path": str(folder / "cache")}


def train_and_ask(values):
    """Train as ever, but let the stages also tell each other their shapes; how many were received, and of how many
    kinds."""
    planned, received = PlannedCommunicator._communicate_shapes, []

    def both(self, *args):
        expected = [tuple(shape) for shape in P2PCommunicator._communicate_shapes(self, *args)]
        assert [tuple(shape) for shape in planned(self, *args)] == expected
        received.extend(shape for shape in expected if any(shape))
        return expected

    PlannedCommunicator._communicate_shapes = both
    train_and_tell(values)
    return len(received), len(set(received))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_gives_the_shapes_that_are_sent(name, tmp_path):
    ranks, layout = LAYOUTS[name]
    changes = {"train_iters": 3, "max_tokens_per_microbatch": 50} | layout
    if "sequence_layout" in layout:
        del changes["max_tokens_per_microbatch"]
    for messages, kinds in run_ranks(ranks, train_and_ask, BASE | data_in(tmp_path) | changes):
        assert messages >= 8
        assert kinds > 2, "lengths that are all alike prove nothing"


def count_messages(values):
    """Tensors that this rank sends to other stages in training, and how many of them are whole numbers."""
    sent, real = [], dist.batch_isend_irecv

    def counting(operations):
        sent.extend(o.tensor for o in operations if o.op is dist.isend)
        return real(operations)

    dist.batch_isend_irecv = counting
    train_and_tell(values)
    return len(sent), sum(not tensor.is_floating_point() for tensor in sent)


@pytest.mark.slow
def test_nothing_but_hidden_states_is_sent_between_stages(tmp_path):
    for sent, numbers in run_ranks(2, count_messages, BASE | data_in(tmp_path) | PP2 | {"train_iters": 2}):
        assert sent >= 4
        assert numbers == 0
